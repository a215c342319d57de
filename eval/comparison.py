"""Two models' answers to the same questions, compared in pairs: what was lost, and how sure that is.

    python -c "from lightship.eval.comparison import loss_interval; print(loss_interval(12, 2, 100))"

Both models answer the same questions, so only the questions on which they differ carry information. Of n questions, b
are answered correctly by the source only (lost) and c by the quantized model only (gained); the loss is (b - c) / n.
"""

import math

from lightship.errors import EvaluationError
from lightship.records import Accuracy, Comparison

Z_95 = 1.959963984540054
MOST_QUESTIONS = 10_000_000


def compare(source: Accuracy, quantized: Accuracy) -> Comparison:
    """Pair the answers by question.

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
    low, high = loss_interval(len(lost), len(gained), len(by_source))
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
    )


def mcnemar_p_value(lost: int, gained: int) -> float:
    """Exact two-sided McNemar test: the probability of so uneven a split if lost and gained were equally likely."""
    discordant = lost + gained
    tail: int = sum(math.comb(discordant, k) for k in range(min(lost, gained) + 1))
    return min(1.0, float(2 * tail / 2**discordant))


def loss_interval(lost: float, gained: float, questions: float, z: float = Z_95) -> tuple[float, float]:
    """Tango's score interval of the difference of two paired proportions, 95 % unless `z` says otherwise.

    It keeps its coverage when few pairs are discordant, where the usual Wald interval collapses: with none at all among
    n it is ±z² / (n + z²), not ±0. Counts may be fractional.

    Source: T. Tango, Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design, Statistics in Medicine 17 (1998) 891-908.
    """
    middle = (lost - gained) / questions

    def root(outer: float, target: float) -> float:
        """The difference between `middle` and `outer` at which the score, which falls as it grows, is `target`."""
        inner = middle
        for _ in range(60):
            half = (inner + outer) / 2
            if abs(_score(half, lost, gained, questions)) < abs(target):
                inner = half
            else:
                outer = half
        return inner

    return root(-1.0, z), root(1.0, -z)


def questions_needed(comparison: Comparison, limit: float) -> int | None:
    """How many questions in all would settle whether the loss is within `limit`, if the rates seen so far hold.

    None if not even ten million would: the loss seen is about as large as the limit.
    """
    n = comparison.questions
    lost, gained = len(comparison.lost) / n, len(comparison.gained) / n

    def settles(questions: int) -> bool:
        low, high = loss_interval(lost * questions, gained * questions, questions)
        return high <= limit or low > limit

    if not settles(MOST_QUESTIONS):
        return None
    too_few, enough = n, MOST_QUESTIONS
    while enough - too_few > 1:
        half = (too_few + enough) // 2
        too_few, enough = (too_few, half) if settles(half) else (half, enough)
    return enough


def _score(difference: float, lost: float, gained: float, questions: float) -> float:
    """Tango's score statistic of the hypothesis that the difference is `difference`, in standard deviations."""
    distance = lost - gained - questions * difference
    if distance == 0:
        return 0.0
    b = -lost - gained + (2 * questions - lost + gained) * difference
    c = -gained * difference * (1 - difference)
    q_gained = (math.sqrt(max(b * b - 8 * questions * c, 0.0)) - b) / (4 * questions)
    variance = questions * (2 * q_gained + difference * (1 - difference))
    return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)
