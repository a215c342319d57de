"""Did any subject get worse? Each subject's paired loss, tested with the number of subjects in mind.

    lightship compare RELEASE RELEASE

With fourteen subjects, one will look worse by chance more often than not. Each is tested by the exact one-sided McNemar
test, and the p-values are adjusted by Holm's step-down, so that the probability of naming any subject that did not lose
stays below the level.

Source: S. Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6 (1979).
"""

import math
from collections.abc import Sequence

from lightship.eval.interval import deviations, loss_interval
from lightship.eval.sequential import deviation_at
from lightship.records import AnsweredQuestion, SubjectLoss

CONFIDENCE = 0.95
"""Of all subjects' intervals together."""


def compare_subjects(
    pairs: Sequence[tuple[AnsweredQuestion, AnsweredQuestion]], looks: Sequence[int] = (), planned: int | None = None
) -> list[SubjectLoss]:
    """The loss of each subject, by name; the intervals hold for all subjects at once (Bonferroni).

    Args:
        looks, planned: as in `comparison.compare`; a stage holds subjects in their shares, so that each has been looked
            at as far as the whole.
    """
    by_subject: dict[str, list[tuple[bool, bool]]] = {}
    for before, after in pairs:
        by_subject.setdefault(before.category, []).append((before.correct, after.correct))
    subjects = sorted(by_subject)
    lost = [sum(a and not b for a, b in by_subject[s]) for s in subjects]
    gained = [sum(b and not a for a, b in by_subject[s]) for s in subjects]
    p_values = [worse_p_value(b, c) for b, c in zip(lost, gained, strict=True)]
    together = 1 - (1 - CONFIDENCE) / max(len(subjects), 1)
    z = deviation_at(looks, planned or len(pairs), together) if looks else deviations(together)
    found = []
    for subject, b, c, p, adjusted in zip(subjects, lost, gained, p_values, holm(p_values), strict=True):
        questions = len(by_subject[subject])
        low, high = loss_interval(b, c, questions, z)
        found.append(
            SubjectLoss(
                subject=subject,
                questions=questions,
                source_accuracy=sum(a for a, _ in by_subject[subject]) / questions,
                quantized_accuracy=sum(b for _, b in by_subject[subject]) / questions,
                lost=b,
                gained=c,
                loss=(b - c) / questions,
                loss_low=low,
                loss_high=high,
                p_value=p,
                p_adjusted=adjusted,
            )
        )
    return found


def worse_p_value(lost: int, gained: int) -> float:
    """Exact one-sided McNemar test: the probability of as many lost or more, if lost and gained were equally likely."""
    discordant = lost + gained
    return float(sum(math.comb(discordant, k) for k in range(lost, discordant + 1)) / 2**discordant)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values, in the order given: reject those at most alpha, and any error has at most that probability."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
