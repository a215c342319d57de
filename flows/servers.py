"""The two servers of a release, source and quantized, each launched when a stage first asks for it."""

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from lightship.endpoint import Endpoint
from lightship.records import Staged
from lightship.release import Release
from lightship.serving.launch import Launched, launched, stage


class Servers:
    """Launches by the recipe's `serving`; stops whatever it launched at the end of the `with` block."""

    def __init__(self, work: Release) -> None:
        self._work = work
        self._stack = ExitStack()
        self._servers: dict[str, Launched] = {}

    def __enter__(self) -> "Servers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    @property
    def source(self) -> Endpoint:
        return self._launched("source", self._work.source.path).endpoint

    @property
    def quantized(self) -> Endpoint:
        return self._launched("quantized", self._work.checkpoint_dir).endpoint

    def stage(self) -> Staged:
        """Launch the quantized checkpoint and record that it answers."""
        return stage(self._work.checkpoint_dir, self._launched("quantized", self._work.checkpoint_dir))

    def _launched(self, name: str, path: Path) -> Launched:
        if name not in self._servers:
            log_file = self._work.directory / f"serve-{name}.log"
            served_name = f"{self._work.recipe.model}-{name}"
            server = launched(path, self._work.recipe.serving, log_file, name=served_name)
            self._servers[name] = self._stack.enter_context(server)
        return self._servers[name]
