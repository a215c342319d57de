"""Launch a server as a process of its own, wait until it answers, and put it away: staging, evaluation, comparison.

    with launched(path, Serving(tp=2), Path("serve.log")) as server:
        staged = stage(path, server)

Two servers at once: `start` both, then `wait_until_ready` for both.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from lightship.checkpoint import MANIFEST, Checkpoint
from lightship.endpoint import Endpoint
from lightship.errors import ServingError
from lightship.files import digest_of, digest_of_file
from lightship.manifest import check_files
from lightship.recipe import Serving
from lightship.records import Staged
from lightship.serving.serve import WHILE_STDIN_OPEN

GREETING = "Hello"
GREETING_TOKENS = 16
GRACE_SECONDS = 15
POLL_SECONDS = 0.1
LOG_LINES = 20
READY = re.compile(r"^lightship: serving .* on (http://\S+) after [\d.]+ s$", re.MULTILINE)
"""What a server says once it is ready: the address that it, and nobody else, listens on."""


@dataclass
class Launched:
    """A server process that is loading or ready."""

    path: Path
    name: str
    command: list[str]
    settings: Serving
    log_file: Path
    process: "subprocess.Popen[bytes]"
    started: float = field(default_factory=time.perf_counter)
    ready_seconds: float = 0.0
    """From the start to the first healthy answer; 0 until `wait_until_ready`."""
    base_url: str = ""
    """Read from the server's log by `wait_until_ready`."""

    @property
    def endpoint(self) -> Endpoint:
        """Where a ready server answers."""
        assert self.base_url, "wait_until_ready comes first"
        return Endpoint(self.base_url, self.name, self.path, self._identity)

    @cached_property
    def _identity(self) -> str:
        """Of the files that are served and of the settings that change what comes out."""
        settings = self.settings
        return digest_of([Checkpoint.open(self.path).fingerprint(), settings.engine, settings.tp, settings.activations])

    def wait_until_ready(self) -> None:
        """Return when the server has said that it is ready, and /health at its address answers 200.

        Raises:
            ServingError: the process ends, or is not ready within the recipe's `ready_seconds`.
        """
        import httpx

        while self.process.poll() is None:
            said = READY.search(self.log_file.read_text(encoding="utf-8", errors="replace"))
            with suppress(httpx.TransportError):
                if said and httpx.get(f"{said[1]}/health", timeout=5, trust_env=False).status_code == 200:
                    self.base_url, self.ready_seconds = said[1], time.perf_counter() - self.started
                    return
            if time.perf_counter() - self.started > self.settings.ready_seconds:
                raise self._failed(
                    f"is not ready after {self.settings.ready_seconds} s; raise ready_seconds in the recipe's [serving]"
                )
            time.sleep(POLL_SECONDS)
        raise self._failed(f"ended with exit code {self.process.returncode}")

    def stop(self) -> None:
        """End the server and everything in its process group."""
        if self.process.poll() is None:
            self._signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE_SECONDS)
        self._signal(signal.SIGKILL)
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def _failed(self, what: str) -> ServingError:
        lines = self.log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
        log = "\n".join(f"  | {line}" for line in lines) or "  | (empty)"
        return ServingError(
            f"the server {what}\n  command: {' '.join(self.command)}\n  the end of its log, {self.log_file}:\n{log}"
        )


def start(path: Path, settings: Serving, log_file: Path, port: int = 0, name: str | None = None) -> Launched:
    """Start `lightship serve` for a checkpoint directory, its output going to `log_file`; returns at once.

    Args:
        port: 0 takes a free one.
        name: what clients call the model; the directory's name if None.
    """
    name = name or path.resolve().name
    command = [
        *(sys.executable, "-P", "-m", "lightship", "serve", str(path), "--tp", str(settings.tp), "--host", "127.0.0.1"),
        *("--port", str(port), "--activations", settings.activations, "--name", name),
    ]
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {WHILE_STDIN_OPEN: "1"},
        )
    return Launched(path, name, command, settings, log_file, process)


@contextmanager
def launched(
    path: Path, settings: Serving, log_file: Path, port: int = 0, name: str | None = None
) -> Iterator[Launched]:
    """`start`, wait until ready, and stop at the end.

    Raises:
        ServingError: see `Launched.wait_until_ready`; it quotes the end of the log.
    """
    server = start(path, settings, log_file, port, name)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


def stage(path: Path, server: Launched) -> Staged:
    """Check `path`, which the ready server serves, against its manifest, greet the server, and record that it answered.

    Raises:
        CheckpointError: a file is not what the manifest says.
        ServingError: it does not answer, or answers with an error.
    """
    import httpx

    check_files(path)
    body = {"model": server.endpoint.model, "prompt": GREETING, "max_tokens": GREETING_TOKENS, "temperature": 0}
    try:
        response = httpx.post(f"{server.endpoint.base_url}/v1/completions", json=body, timeout=60, trust_env=False)
        response.raise_for_status()
    except httpx.HTTPError as error:
        raise ServingError(
            f"the server of {path} is up but does not complete {GREETING!r}: {error}; its log is {server.log_file}"
        ) from error
    return Staged(
        engine=server.settings.engine,
        base_url=server.endpoint.base_url,
        command=server.command,
        tensor_parallel=server.settings.tp,
        manifest_digest=digest_of_file(path / MANIFEST),
        ready_seconds=server.ready_seconds,
        greeting=response.json()["choices"][0]["text"],
    )
