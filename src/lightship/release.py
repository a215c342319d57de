"""A release: its identity, its directory, and the rule that a finished stage is never run twice.

    HOME/releases/<release id>/   release.json, one JSON a stage, checkpoint/, report.html, logs
    HOME/sources/<id>/            what was measured on a source checkpoint and serves every release made from it

The release id is a hash of everything that decides the result: the source's content, the recipe, the texts and
questions it names, lightship's own code, and the engine. The same inputs give the same id and the same directory.
"""

import contextlib
import importlib
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from lightship import __version__
from lightship.checkpoint import Checkpoint
from lightship.errors import LightshipError
from lightship.files import digest_of, digest_of_file, locked, read_json, write_json
from lightship.recipe import HUB_QUESTIONS, AccuracyTask, Recipe, TextSource, ThroughputLoad, load_recipe
from lightship.records import Record
from lightship.rows import digest_of_rows
from lightship.splits import all_splits, digest_of_splits
from lightship.text import digest_of_text

R = TypeVar("R", bound=Record)
PACKAGES = (
    "lightship",
    "lightship.quant",
    "lightship.eval",
    "lightship.eval.load",
    "lightship.serving",
    "lightship.flows",
)
ENGINE_PACKAGES = ("torch", "transformers", "lm-eval")
ID_LENGTH = 12
CHAMPION = "champion"
"""The alias of the release that is served, and its name on the command line."""


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """What a release is made of; its hash is the release id."""

    source: str
    recipe: str
    texts: str
    questions: str
    code: str
    engine: str

    @property
    def release_id(self) -> str:
        return digest_of(self)[:ID_LENGTH]


class ReleaseFile(msgspec.Struct, frozen=True, kw_only=True):
    """release.json: where a release came from, so that its directory can be understood alone."""

    release_id: str
    identity: Identity
    source: str
    recipe_path: str
    recipe: Recipe
    versions: dict[str, str]


@dataclass(frozen=True)
class StageDone:
    """Told after each stage: its record, whether it had been finished before, and how long it took now."""

    name: str
    record: Record
    cached: bool
    seconds: float


@dataclass
class Release:
    """One release at work. `on_stage` hears of every finished stage, whether it was run now or found finished."""

    home: Path
    source: Checkpoint
    recipe: Recipe
    recipe_path: Path
    identity: Identity
    on_stage: Callable[[StageDone], None] = lambda _: None
    ran: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, source: Path, recipe_path: Path, home: Path) -> "Release":
        """Identify the release of `source` by the recipe; nothing is written.

        Raises:
            LightshipError: source, recipe, texts or questions cannot be read.
        """
        checkpoint = Checkpoint.open(source)
        recipe = load_recipe(recipe_path)
        return cls(home, checkpoint, recipe, recipe_path, identify(checkpoint, recipe))

    @property
    def release_id(self) -> str:
        return self.identity.release_id

    @property
    def directory(self) -> Path:
        return self.home / "releases" / self.release_id

    @property
    def checkpoint_dir(self) -> Path:
        """Where the quantized checkpoint is; named for people, since servers show it as the model's name."""
        return self.directory / "checkpoint"

    @property
    def source_directory(self) -> Path:
        """Shared by all releases whose source is measured in the same way."""
        identity, recipe = self.identity, self.recipe
        how = [identity.source, identity.questions, identity.code, identity.engine, task_name(recipe)]
        settings = settings_of(recipe)
        return self.home / "sources" / digest_of([*how, settings["accuracy"], settings["serving"]])[:ID_LENGTH]

    def stage(self, name: str, kind: type[R], run: Callable[[], R], directory: Path | None = None) -> R:
        """The stage's record: read if it is finished, else run and written; the record is the mark of being finished.

        With `directory`, the stage is shared with other releases: its mark is there, and the release keeps a copy.
        """
        path = (directory or self.directory) / f"{name}.json"
        start = time.monotonic()
        with locked(directory, wait=True) if directory else contextlib.nullcontext():
            cached = path.is_file()
            record = read_json(path, kind) if cached else run()
            if not cached:
                write_json(path, record)
                self.ran.append(name)
        if directory and not self.finished(name):
            write_json(self.directory / f"{name}.json", record)
        self.on_stage(StageDone(name, record, cached, time.monotonic() - start))
        return record

    def finished(self, name: str) -> bool:
        return (self.directory / f"{name}.json").is_file()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Make the release's directory, hold its lock, and say in release.json what the release is.

        Raises:
            LightshipError: another process works on this release.
        """
        with locked(self.directory, wait=False):
            write_json(
                self.directory / "release.json",
                ReleaseFile(
                    release_id=self.release_id,
                    identity=self.identity,
                    source=str(self.source.path),
                    recipe_path=str(self.recipe_path),
                    recipe=self.recipe,
                    versions=versions(),
                ),
            )
            yield


def identify(source: Checkpoint, recipe: Recipe) -> Identity:
    """Hash what decides the release. Paths do not count, the content behind them does."""
    return Identity(
        source=source.digest,
        recipe=digest_of([settings_of(recipe), task_name(recipe)]),
        texts=digest_of([digest_of_text(recipe.calibration.sources), digest_of_text(recipe.fidelity.sources)]),
        questions=digest_of([digest_of_questions(recipe.accuracy), digest_of_trace(recipe.throughput)]),
        code=digest_of_code(),
        engine=digest_of([recipe.serving.engine, *(version(p) for p in ENGINE_PACKAGES)]),
    )


def digest_of_trace(load: ThroughputLoad) -> str | None:
    """SHA-256 of the trace's file, if there is one.

    Raises:
        LightshipError: it is missing.
    """
    if load.trace is None:
        return None
    path = Path(load.trace.path)
    if not path.is_file():
        raise LightshipError(f"the trace {path} is missing; check `throughput.trace.path` of the recipe")
    return digest_of_file(path)


def digest_of_questions(task: AccuracyTask) -> str:
    """SHA-256 of what the questions and the local data of further tasks hold; of the Hub's questions, of their commit.

    Further tasks' data on the Hub is not looked at: lm-eval's version, which is part of the engine, names it.

    Raises:
        LightshipError: a file is missing, or the Hub's dataset cannot be found.
    """
    if task.questions is not None:
        questions: object = digest_of_splits(Path(task.questions), ["test", "validation"])
    else:
        hub = TextSource(scene="questions", dataset=HUB_QUESTIONS, split="test", revision=task.revision)
        questions = digest_of_rows(hub)
    local = {s.name: Path(s.path) for s in task.task_sources if s.path is not None}
    return digest_of(
        [questions, {name: digest_of_splits(folder, all_splits(folder)) for name, folder in local.items()}]
    )


@cache
def digest_of_code(packages: tuple[str, ...] = PACKAGES) -> str:
    """SHA-256 over lightship's installed source files, of all packages or of some.

    Read once: a process that lives on runs what it has loaded, whatever is installed in its place.
    """
    digests: dict[str, str] = {}
    for package in packages:
        (folder,) = importlib.import_module(package).__path__
        digests |= {f"{package}/{p.name}": digest_of_file(p) for p in sorted(Path(folder).glob("*.py"))}
    return digest_of(digests)


def versions() -> dict[str, str]:
    """Versions of what a release rests on."""
    return {"lightship": __version__, "python": platform.python_version(), **{p: version(p) for p in ENGINE_PACKAGES}}


def evaluation_directory(home: Path, target: str, recipe: Recipe) -> Path:
    """Where `lightship evaluate` keeps the answers of a checkpoint or a URL: the same command, the same place.

    How many are asked, and where the questions lie, does not count: each answer knows what was asked. Of a checkpoint
    our own code does, since it computes the answers.
    """
    what = [target.rstrip("/")] if "://" in target else [str(Path(target).resolve()), digest_of_code()]
    return home / "evaluations" / digest_of([*what, task_name(recipe)])[:ID_LENGTH]


def find_release(home: Path, release_id: str) -> ReleaseFile:
    """The one release in `home` whose id starts with `release_id`.

    Raises:
        LightshipError: none does, or several do.
    """
    found = sorted(p.name for p in (home / "releases").glob(f"{release_id}*") if (p / "release.json").is_file())
    if len(found) != 1:
        known = ", ".join(sorted(p.name for p in (home / "releases").glob("*"))) or "none"
        many = "no release" if not found else "more than one release"
        raise LightshipError(f"{many} in {home} has an id that starts with {release_id!r}; there: {known}")
    return read_json(home / "releases" / found[0] / "release.json", ReleaseFile)


class Champions(Protocol):
    """Who knows the champions; `Tracker` does."""

    def champion_release(self, model: str) -> str | None: ...


def find_releases(home: Path, names: list[str], champions: Champions) -> list[str]:
    """The ids of the releases in `home` that are meant: by their first characters, or `champion`.

    The champion is that of the other releases' model; named alone, that of the only model in `home`.

    Raises:
        LightshipError: no release is meant, or several are, or there is no champion.
    """
    others = [name for name in names if name != CHAMPION]
    found = {name: find_release(home, name) for name in others}
    ids = {name: release.release_id for name, release in found.items()}
    if CHAMPION in names:
        known = list(found.values()) or [find_release(home, p.name) for p in (home / "releases").glob("*")]
        models = sorted({release.recipe.model for release in known})
        if len(models) != 1:
            raise LightshipError(f"{len(models)} models could be meant by `champion`: {', '.join(models)}; give its id")
        champion = champions.champion_release(models[0])
        if champion is None:
            raise LightshipError(f"{models[0]} has no champion yet; `lightship promote RELEASE` makes one")
        ids[CHAMPION] = champion
    return [ids[name] for name in names]


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """The recipe's settings without its paths, since what is behind them counts and not where it lies, and without
    its cluster, which changes nothing of the result."""
    settings = _without_paths({k: v for k, v in msgspec.to_builtins(recipe).items() if k != "cluster"})
    assert isinstance(settings, dict)
    return settings


def task_name(recipe: Recipe) -> str:
    """What the accuracy task is called."""
    return recipe.accuracy.task_name


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_paths(v) for k, v in value.items() if k not in ("path", "questions")}
    if isinstance(value, list):
        return [_without_paths(v) for v in value]
    return value
