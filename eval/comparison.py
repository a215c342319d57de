"""Two models' answers to the same questions, compared in pairs: what was lost, and how sure that is.

    lightship decide RELEASE

Both models answer the same questions, so only the questions on which they differ carry information. Of n questions, b
are answered correctly by the first only (lost) and c by the second only (gained); the loss is (b - c) / n. The first is
the source, or the champion; the second is what may replace it.
"""

import math
from collections.abc import Sequence

from lightship.errors import EvaluationError
from lightship.eval.interval import deviations, loss_interval
from lightship.eval.sequential import deviation_at
from lightship.eval.subjects import CONFIDENCE, compare_subjects
from lightship.records import Accuracy, AnsweredQuestion, Comparison


def compare(source: Accuracy, quantized: Accuracy, looks: Sequence[int] = (), planned: int | None = None) -> Comparison:
    """Pair the answers by question.

    Args:
        looks: if the questions were asked in stages, how many were answered at each look; the last is all that were.
            The source's answers are then in the order in which they were asked.
        planned: how many would have been asked in all.

    Raises:
        EvaluationError: the two did not answer the same questions under the same settings.
    """
    if (source.task, source.overrides) != (quantized.task, quantized.overrides):
        raise EvaluationError(
            f"the models were not asked under the same settings: {source.task} {source.overrides} and "
            f"{quantized.task} {quantized.overrides}; evaluate both with one recipe"
        )
    by_source = {a.question_id: a for a in source.answers}
    by_quantized = {a.question_id: a for a in quantized.answers}
    unpaired = sorted(by_source.keys() ^ by_quantized.keys())
    if unpaired:
        raise EvaluationError(
            f"{len(unpaired)} questions were answered by one model only, the first is {unpaired[0]!r}; evaluate both "
            "on the same questions, with the same limit and seed"
        )
    lost = [i for i, a in by_source.items() if a.correct and not by_quantized[i].correct]
    gained = [i for i, a in by_source.items() if not a.correct and by_quantized[i].correct]
    z = deviation_at(looks, planned or len(by_source), CONFIDENCE) if looks else deviations(CONFIDENCE)
    low, high = loss_interval(len(lost), len(gained), len(by_source), z)
    return Comparison(
        questions=len(by_source),
        source_accuracy=source.accuracy,
        quantized_accuracy=quantized.accuracy,
        lost=lost,
        gained=gained,
        loss=(len(lost) - len(gained)) / len(by_source),
        loss_low=low,
        loss_high=high,
        p_value=mcnemar_p_value(len(lost), len(gained)),
        subjects=compare_subjects([(a, by_quantized[i]) for i, a in by_source.items()], looks, planned),
        looks=list(looks),
        accuracy_at_looks=[
            (_share_correct(source.answers[:look]), _share_correct([by_quantized[i] for i in list(by_source)[:look]]))
            for look in looks
        ],
        planned=planned,
    )


def _share_correct(answers: Sequence[AnsweredQuestion]) -> float:
    return sum(a.correct for a in answers) / len(answers)


def mcnemar_p_value(lost: int, gained: int) -> float:
    """Exact two-sided McNemar test: the probability of so uneven a split if lost and gained were equally likely."""
    discordant = lost + gained
    tail: int = sum(math.comb(discordant, k) for k in range(min(lost, gained) + 1))
    return min(1.0, float(2 * tail / 2**discordant))
