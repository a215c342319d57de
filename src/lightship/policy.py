"""A policy: what a release must meet to be promoted. It is the table [gate] of a recipe, or of a file of its own.

lightship decide RELEASE --policy FILE
"""

import math
from pathlib import Path
from typing import Annotated

import msgspec

from lightship.errors import RecipeError
from lightship.records import Against
from lightship.section import Fraction, NotNegative, Positive, Section, read_toml


class AtMost(Section, frozen=True, kw_only=True):
    """Limits of a value that is better small. A plain number is `at_most`."""

    at_most: float | None = None
    over_source: float | None = None
    """It may be this much above the source's."""
    over_champion: float | None = None
    """It may be this much above the champion's of the day; without a champion the rule is met."""

    def __post_init__(self) -> None:
        if self.at_most is None and self.over_source is None and self.over_champion is None:
            raise ValueError("a rule needs at_most, over_source or over_champion")

    @property
    def limits(self) -> list[tuple[Against, float]]:
        """What the value is held against, and by how much."""
        return _given(self.at_most, self.over_source, self.over_champion)


class AtLeast(Section, frozen=True, kw_only=True):
    """Limits of a value that is better large. A plain number is `at_least`."""

    at_least: float | None = None
    under_source: float | None = None
    """It may be this much below the source's."""
    under_champion: float | None = None
    """It may be this much below the champion's of the day; without a champion the rule is met."""

    def __post_init__(self) -> None:
        if self.at_least is None and self.under_source is None and self.under_champion is None:
            raise ValueError("a rule needs at_least, under_source or under_champion")

    @property
    def limits(self) -> list[tuple[Against, float]]:
        """What the value is held against, and by how much."""
        return _given(self.at_least, self.under_source, self.under_champion)


def _given(limit: float | None, source: float | None, champion: float | None) -> list[tuple[Against, float]]:
    named: list[tuple[Against, float | None]] = [("limit", limit), ("source", source), ("champion", champion)]
    return [(against, number) for against, number in named if number is not None]


class GpuFit(Section, frozen=True, kw_only=True):
    """Eight GPUs on which the result must fit."""

    gpu: str
    """The beginning of a size's name: `80 GB`, `96 GB`, `141 GB`."""
    cache_tokens: Positive = 1
    """Tokens for which each GPU must have room in its KV cache."""


class Gate(Section, frozen=True, kw_only=True):
    """What a release must meet to be promoted; an absent rule does not apply. Fractions are 0 to 1."""

    confidence: Annotated[float, msgspec.Meta(ge=0.5, lt=1)] = 0.95
    """Of the interval by which losses are judged: either wrong verdict has half of what is missing to 1."""
    accuracy_loss: Fraction | AtMost | None = None
    """Limit of the accuracy loss: pass if its interval is below it, fail if it is above, else inconclusive."""
    subject_loss: Fraction | AtMost | None = None
    """Fail if any subject is shown to lose more than this, with the number of subjects in mind."""
    kl: NotNegative | AtMost | None = None
    """Mean KL(source || quantized) a token, in nats."""
    kl_worst_scene: NotNegative | AtMost | None = None
    top1_agreement: Fraction | AtLeast | None = None
    truncated: Fraction | AtMost | None = None
    unparsed: Fraction | AtMost | None = None
    starved_experts: Fraction | AtMost | None = None
    """Share of the experts that saw fewer calibration tokens than `quantization.token_floor`."""
    throughput_ratio: NotNegative | AtLeast | None = None
    """Queries a minute over the source's, at the highest concurrency."""
    ttft_ratio: NotNegative | AtMost | None = None
    """Median time to the first token over the source's, at the highest concurrency."""
    bytes_after: NotNegative | AtMost | None = None
    """Of the result's tensors."""
    experts_shrink: Fraction | AtLeast | None = None
    fit: GpuFit | None = None

    def limits(self, rule: str) -> list[tuple[Against, float]]:
        """The limits of a rule, by name; none if it does not apply."""
        given = getattr(self, rule)
        if given is None:
            return []
        return given.limits if isinstance(given, AtMost | AtLeast) else [("limit", float(given))]

    @property
    def by_champion(self) -> bool:
        """Some rule compares with the champion."""
        return any(against == "champion" for rule in RULES_WITH_LIMITS for against, _ in self.limits(rule))


RULES_WITH_LIMITS = tuple(name for name in Gate.__struct_fields__ if name not in ("confidence", "fit"))
FRACTIONS = frozenset(
    ("accuracy_loss", "subject_loss", "top1_agreement", "truncated", "unparsed", "starved_experts", "experts_shrink")
)


def check_gate(gate: Gate) -> None:
    """Refuse limits that nothing can exceed or meet, and a gate that would promote any model.

    The champion alone is no measure, since the first has none.
    """
    for rule in RULES_WITH_LIMITS:
        most = 1 if rule in FRACTIONS else math.inf
        for _, limit in gate.limits(rule):
            if not 0 <= limit <= most or math.isinf(limit):
                ends = "from 0 to 1" if most == 1 else "0 or more, and finite"
                raise ValueError(f"the gate's {rule} has a limit of {limit:g}; it must be {ends}")
    if all(against == "champion" for rule in ("accuracy_loss", "kl") for against, _ in gate.limits(rule)):
        raise ValueError("the gate needs accuracy_loss or kl: without one it would promote any model")


def load_policy(path: Path) -> Gate:
    """Read a gate from a file of its own: a TOML file with the table [gate], as a recipe has it.

    Raises:
        RecipeError: the file is missing, not TOML, without [gate], or has an unknown rule or a value out of its range.
    """
    table = read_toml(path, "policy")
    if "gate" not in table:
        raise RecipeError(f"the policy {path} has no table [gate]; docs/gate.md shows one")
    try:
        gate = msgspec.convert(table["gate"], Gate)
        check_gate(gate)
    except (msgspec.ValidationError, ValueError) as error:
        raise RecipeError(f"the policy {path}: {error}; docs/gate.md lists every rule") from error
    return gate
