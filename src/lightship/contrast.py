"""Two releases held against each other: the settings that differ, and every metric with its difference and direction.

    lightship compare 3f2a champion

Pure: what MLflow holds of two runs goes in. Which of two numbers is the better one follows from the metric's name;
whether a difference is more than chance is for the paired comparison to say.
"""

import re
from collections.abc import Mapping
from typing import Literal

import msgspec

from lightship.lineage import IDENTITY, VERSION
from lightship.records import Comparison

Direction = Literal["better", "worse", "same", "other"]
"""`other`: the two differ, and neither value is better."""
LESS = (
    "accuracy_loss", "accuracy_loss_low", "accuracy_loss_high", "accuracy_loss_subjects_worse", "truncated", "unparsed",
    "kl", "perplexity_quantized", "errors", "bytes_after", "experts_starved", "experts_without_tokens",
    "layers_with_outliers", "failed_checks", "rules_not_passed", "seconds", "ready_seconds",
)  # fmt: skip
"""Last parts of the names of metrics that are better when smaller; so are those with `error_` or `_ms` in them."""
MORE = (
    "accuracy", "top1_agreement", "same_answer", "same_text", "common_prefix", "common_share", "experts_shrink",
    "least_expert_tokens", "queries_per_minute", "output_tokens_per_second", "goodput",
)  # fmt: skip
"""Those that are better when larger; so is all below `accuracy/`, `task/` and `throughput/ratio/`."""
CURVES = "by_"
"""Series have no single value to compare; their means are metrics of their own."""


class ReleaseSide(msgspec.Struct, frozen=True, kw_only=True):
    """What MLflow holds of one release."""

    release_id: str
    name: str
    verdict: str
    promoted: str
    """`champion`, the version that it once was champion as, or `no`."""
    created: str
    """UTC, ISO 8601."""
    settings: dict[str, str]
    """Parameters, and the tags of identity and versions."""
    metrics: dict[str, float]


class SettingContrast(msgspec.Struct, frozen=True, kw_only=True):
    """A setting that differs; null where a release does not have it."""

    name: str
    first: str | None
    second: str | None


class MetricContrast(msgspec.Struct, frozen=True, kw_only=True):
    """A metric of two releases; null where a release does not have it."""

    name: str
    first: float | None
    second: float | None
    difference: float | None
    """Second minus first."""
    direction: Direction
    """What the second is, against the first."""


class Contrast(msgspec.Struct, frozen=True, kw_only=True):
    """Two releases, the second against the first."""

    first: ReleaseSide
    second: ReleaseSide
    settings: list[SettingContrast]
    metrics: list[MetricContrast]
    answers: Comparison | None
    """Their answers in pairs: `source` is the first release, `quantized` the second."""
    not_paired: str | None
    """Why there are no pairs."""


def side_of(
    name: str, params: Mapping[str, str], tags: Mapping[str, str], metrics: Mapping[str, float], champion: bool, at: str
) -> ReleaseSide:
    """One release, from its run's name, parameters, tags and metrics.

    Args:
        champion: it is the champion now.
        at: when the run was made.
    """
    return ReleaseSide(
        release_id=tags["lightship.release_id"],
        name=name,
        verdict=tags.get("lightship.verdict", "none yet"),
        promoted="champion" if champion else tags.get("lightship.promoted", "no"),
        created=at,
        settings=dict(params) | {k: v for k, v in tags.items() if k.startswith((IDENTITY, VERSION))},
        metrics={k: v for k, v in metrics.items() if not k.startswith(CURVES)},
    )


def contrast(
    first: ReleaseSide, second: ReleaseSide, answers: Comparison | None = None, not_paired: str | None = None
) -> Contrast:
    """Hold the second release against the first."""
    settings = [
        SettingContrast(name=k, first=first.settings.get(k), second=second.settings.get(k))
        for k in sorted(first.settings.keys() | second.settings.keys())
        if first.settings.get(k) != second.settings.get(k)
    ]
    metrics = [
        _metric(k, first.metrics.get(k), second.metrics.get(k))
        for k in sorted(first.metrics.keys() | second.metrics.keys(), key=_natural)
    ]
    return Contrast(
        first=first, second=second, settings=settings, metrics=metrics, answers=answers, not_paired=not_paired
    )


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Orders `c4` before `c16`."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]


def _metric(name: str, first: float | None, second: float | None) -> MetricContrast:
    if first is None or second is None:
        return MetricContrast(name=name, first=first, second=second, difference=None, direction="other")
    difference = second - first
    return MetricContrast(
        name=name, first=first, second=second, difference=difference, direction=_direction(name, difference)
    )


def _direction(name: str, difference: float) -> Direction:
    if difference == 0:
        return "same"
    wanted = better_when(name)
    if wanted is None:
        return "other"
    return "better" if (difference > 0) == (wanted == "more") else "worse"


def better_when(metric: str) -> Literal["more", "less"] | None:
    """Which way a metric improves; None for what is neither good nor bad, such as all that is the source's."""
    if metric.startswith(("source/", "throughput/source/")):
        return None
    last = metric.rpartition("/")[2]
    if last in LESS or last.endswith("_ms") or "error_" in last:
        return "less"
    if last in MORE or metric.startswith(("accuracy/", "task/", "throughput/ratio/")):
        return "more"
    return None
