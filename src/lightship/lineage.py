"""Where a release comes from, as MLflow shows it: a few flat parameters, tags, and datasets with their digests."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from lightship.recipe import HUB_QUESTIONS, CalibrationText, FidelityText
from lightship.release import ID_LENGTH, Release, settings_of, versions
from lightship.text import digest_of_text

IDENTITY, VERSION = "identity.", "version."
"""What the names of tags begin with."""


@dataclass(frozen=True)
class DatasetUse:
    """A dataset that a release reads, by content."""

    name: str
    digest: str
    """The first 12 digits of its SHA-256."""
    context: str
    """What it is read for: `calibration`, `fidelity`, `evaluation`."""
    sources: list[str]
    """Paths, or names on the Hub."""
    profile: dict[str, Any]
    """What is read of it."""


def parameters(release: Release) -> dict[str, str]:
    """Every setting of the recipe that is set.

    A list of tables becomes one parameter, so that a recipe with four scenes has no forty parameters.
    """
    return {k: str(v) for k, v in _flattened(settings_of(release.recipe))}


def tags(release: Release) -> dict[str, str]:
    """Whence it came and what made it: paths, the digests of its identity, versions."""
    return {
        "lightship.model": release.recipe.model,
        "lightship.source": str(release.source.path),
        "lightship.recipe": str(release.recipe_path),
        "mlflow.source.name": f"lightship release {release.source.path} --recipe {release.recipe_path}",
        "mlflow.source.type": "LOCAL",
        **{f"{IDENTITY}{k}": v[:ID_LENGTH] for k, v in msgspec.to_builtins(release.identity).items()},
        **{f"{VERSION}{name}": number for name, number in versions().items()},
    }


def datasets(release: Release) -> list[DatasetUse]:
    """The questions, the calibration text and the held-out text.

    Raises:
        LightshipError: a file is missing, or a dataset cannot be found.
    """
    task = release.recipe.accuracy
    asked: dict[str, Any] = {"limit": task.limit or "all", "seed": task.seed}
    questions = task.questions or HUB_QUESTIONS
    return [
        DatasetUse(task.task_name, release.identity.questions[:ID_LENGTH], "evaluation", [questions], asked),
        _text("calibration-text", "calibration", release.recipe.calibration),
        _text("heldout-text", "fidelity", release.recipe.fidelity),
    ]


def _text(name: str, context: str, text: CalibrationText | FidelityText) -> DatasetUse:
    places = [source.path or source.dataset or "" for source in text.sources]
    read: dict[str, int] = {}
    for source in text.sources:
        read[source.scene] = read.get(source.scene, 0) + source.share(text.tokens_per_scene)
    return DatasetUse(name, digest_of_text(text.sources)[:ID_LENGTH], context, places, {"tokens by scene": read})


def _flattened(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flattened(inner, f"{prefix}.{key}" if prefix else key)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        yield prefix, "; ".join(_line(item) for item in value)
    elif value is not None and value != []:
        yield prefix, value


def _line(item: Any) -> str:
    """A table of a list in one line; `prose` for a source that says no more than its scene."""
    if not isinstance(item, dict):
        return str(item)
    said = {k: v for k, v in item.items() if v is not None and (k, v) != ("weight", 1.0)}
    name = said.pop("scene", said.pop("name", None))
    return " ".join([*([str(name)] if name is not None else []), *(f"{k}={v}" for k, v in said.items())])
