"""Stop asking as soon as the answers settle it, and still be wrong no more often than stated.

    python -m benchmarks.verdicts

Questions are answered in stages. After each, the loss's interval at that look's level is held against the limit: wholly
below is `pass`, wholly above is `fail`, else the next stage is asked. The levels are those of `boundaries`, so that
over all looks together a release whose loss is the limit passes at most (1 - confidence) / 2 of the time, and fails as
rarely. With one look it is the fixed-size verdict. The intervals hold whatever made one stop (Jennison and Turnbull's
repeated confidence intervals), so that another limit may be judged on the same answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from lightship.eval.boundaries import boundaries
from lightship.eval.interval import ONE_QUESTION, deviations, loss_interval, questions_needed
from lightship.records import Comparison, Decision

Step = Literal["continue", "pass", "fail", "inconclusive"]


class Judged(msgspec.Struct, frozen=True, kw_only=True):
    """What the answers so far say about a limit, with the arithmetic."""

    step: Step
    lost: int
    gained: int
    answered: int
    planned: int
    limit: float
    confidence: float
    z: float
    """Standard deviations of the interval at this look."""
    z_last: float
    """And at the last one that is planned."""
    low: float
    high: float
    needed: int | None
    """Questions in all that would settle it if these rates hold; null where it is settled, or where nothing would."""

    @property
    def decision(self) -> Decision:
        """The decision if nothing more is asked."""
        return "inconclusive" if self.step == "continue" else self.step

    @property
    def more(self) -> int | None:
        """Questions that are missing."""
        return None if self.needed is None else self.needed - self.answered


@dataclass(frozen=True)
class LossPolicy:
    """The limit of a loss, and how sure a verdict must be."""

    limit: float
    confidence: float = 0.95
    """Of a two-sided interval: each of the two wrong verdicts has half of what is missing to 1."""


def judge(
    lost: int, gained: int, looks: Sequence[int], planned: int, policy: LossPolicy, *, last: bool | None = None
) -> Judged:
    """Judge the answers so far.

    Args:
        looks: how many questions were answered at each look up to now, this one included.
        planned: how many will be answered if nothing is settled before.
        last: nothing more will be asked; that is so when all planned are answered, if absent.
    """
    answered = looks[-1]
    z = deviation_at(looks, planned, policy.confidence)
    z_last = z if answered == planned else deviation_at([*looks, planned], planned, policy.confidence)
    low, high = loss_interval(lost, gained, answered, z, ONE_QUESTION)
    step: Step
    if high <= policy.limit:
        step = "pass"
    elif low > policy.limit:
        step = "fail"
    else:
        step = "inconclusive" if (answered == planned if last is None else last) else "continue"
    needed = None
    if step not in ("pass", "fail"):
        needed = questions_needed(lost, gained, answered, policy.limit, z_last)
    return Judged(
        step=step,
        lost=lost,
        gained=gained,
        answered=answered,
        planned=planned,
        limit=policy.limit,
        confidence=policy.confidence,
        z=z,
        z_last=z_last,
        low=low,
        high=high,
        needed=needed,
    )


def judge_comparison(comparison: Comparison, policy: LossPolicy) -> Judged:
    """Judge a finished comparison at the level of its last look."""
    looks = comparison.looks or [comparison.questions]
    planned = comparison.planned or comparison.questions
    return judge(len(comparison.lost), len(comparison.gained), looks, planned, policy, last=True)


def deviation_at(looks: Sequence[int], planned: int, confidence: float) -> float:
    """Standard deviations of the interval at the last of these looks."""
    assert 0 < looks[0] <= looks[-1] <= planned, (looks, planned)
    if list(looks) == [planned]:
        return deviations(confidence)
    return boundaries(tuple(look / planned for look in looks), (1 - confidence) / 2)[-1]
