"""How sure a paired loss is: an interval of it, and the questions that would settle it.

    python -c "from lightship.eval.interval import loss_interval; print(loss_interval(12, 2, 100))"

Of n questions that both models answer, `lost` are answered correctly by the source only and `gained` by the other model
only; the loss is (lost - gained) / n.
"""

import math
from statistics import NormalDist
from typing import Any

import numpy as np

Z_95 = 1.959963984540054
ONE_QUESTION = 1.0
"""A verdict must hold even if the difference were one question nearer to the limit. Without it the score interval says
`fail` too often where few questions differ, 5 % of the time in place of 2.5; with it both errors stay below their
level, by exact computation."""
MOST_QUESTIONS = 10_000_000


def deviations(confidence: float) -> float:
    """Standard deviations on either side of a two-sided interval."""
    return NormalDist().inv_cdf((1 + confidence) / 2)


def loss_interval(
    lost: float, gained: float, questions: float, z: float = Z_95, correction: float = 0.0
) -> tuple[float, float]:
    """Tango's score interval of the difference of two paired proportions, 95 % unless `z` says otherwise.

    It keeps its coverage when few pairs are discordant, where the usual Wald interval collapses: with none at all among
    n it is ±z² / (n + z²), not ±0. Counts may be fractional. With `correction`, in questions, both ends are those of a
    difference that much further out.

    Source: T. Tango, Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design, Statistics in Medicine 17 (1998) 891-908.
    """
    middle = (lost - gained) / questions

    def root(outer: float) -> float:
        """The difference between `middle` and `outer` at which the score, which falls as it grows, is z away."""
        inner = middle
        for _ in range(60):
            half = (inner + outer) / 2
            if abs(float(score(half, lost, gained, questions, correction))) < z:
                inner = half
            else:
                outer = half
        return inner

    return root(-1.0), root(1.0)


def score(difference: float, lost: Any, gained: Any, questions: float, correction: float = 0.0) -> Any:
    """Tango's score statistic of the hypothesis that the loss is `difference`, in standard deviations.

    Counts may be arrays of one shape; the result has it too. With `correction`, in questions, the counts are taken as
    that much nearer to the hypothesis.
    """
    lost, gained = np.asarray(lost, dtype=float), np.asarray(gained, dtype=float)
    distance = lost - gained - questions * difference
    distance = np.sign(distance) * np.maximum(np.abs(distance) - correction, 0.0)
    b = -lost - gained + (2 * questions - lost + gained) * difference
    c = -gained * difference * (1 - difference)
    q_gained = (np.sqrt(np.maximum(b * b - 8 * questions * c, 0.0)) - b) / (4 * questions)
    variance = questions * (2 * q_gained + difference * (1 - difference))
    certain = np.where(distance == 0, 0.0, np.copysign(np.inf, distance))
    return np.where(variance > 0, distance / np.sqrt(np.where(variance > 0, variance, 1.0)), certain)


def questions_needed(lost: int, gained: int, questions: int, limit: float, z: float = Z_95) -> int | None:
    """How many questions in all would settle whether the loss is within `limit`, if the rates seen so far hold.

    None if not even ten million would: the loss seen is about as large as the limit.
    """

    def settles(number: int) -> bool:
        scale = number / questions
        return bool(abs(float(score(limit, lost * scale, gained * scale, number, ONE_QUESTION))) >= z)

    if math.isclose((lost - gained) / questions, limit, abs_tol=1e-12) or not settles(MOST_QUESTIONS):
        return None
    too_few, enough = questions, MOST_QUESTIONS
    while enough - too_few > 1:
        half = (too_few + enough) // 2
        too_few, enough = (too_few, half) if settles(half) else (half, enough)
    return enough
