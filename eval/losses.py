"""The gate's rules on losses: estimates with intervals, judged with a stated error, and with the arithmetic shown.

lightship decide RELEASE
"""

import msgspec

from lightship.errors import EvaluationError
from lightship.eval.comparison import compare
from lightship.eval.interval import ONE_QUESTION, loss_interval
from lightship.eval.measures import Evidence, no_champion
from lightship.eval.sequential import Judged, LossPolicy, deviation_at, judge_comparison
from lightship.policy import Gate
from lightship.records import Accuracy, Against, Comparison, Decision, RuleResult


def loss_rules(gate: Gate, evidence: Evidence, champion: Evidence | None) -> list[RuleResult]:
    """The rules `accuracy_loss` and `subject_loss`, those that are set."""
    results = []
    for rule, judged in (("accuracy_loss", _accuracy_loss), ("subject_loss", _subject_loss)):
        for against, limit in gate.limits(rule):
            if against != "champion":
                results.append(judged(evidence.comparison, limit, gate.confidence, against))
            elif champion is None:
                results.append(no_champion(rule, "-", f"at most {points(limit)} under the champion"))
            else:
                results.append(_against_champion(rule, evidence, champion, limit, gate.confidence))
    return results


def _against_champion(rule: str, evidence: Evidence, champion: Evidence, limit: float, confidence: float) -> RuleResult:
    judged = _accuracy_loss if rule == "accuracy_loss" else _subject_loss
    try:
        return judged(compare_with_champion(champion, evidence), limit, confidence, "champion")
    except EvaluationError as error:
        return RuleResult(
            rule=rule,
            decision="inconclusive",
            value="-",
            limit=f"at most {points(limit)} under the champion",
            explanation=f"The champion {champion.release_id} cannot be compared with: {error}.",
            against="champion",
        )


def compare_with_champion(champion: Evidence, challenger: Evidence) -> Comparison:
    """Pair two releases' answers; where one was stopped early, on the questions that both answered.

    Raises:
        EvaluationError: they were asked other questions, or under other settings.
    """
    planned = [e.comparison.planned for e in (champion, challenger)]
    if planned == [None, None]:
        return compare(champion.quantized, challenger.quantized)
    if planned[0] != planned[1]:
        raise EvaluationError(f"{planned[0]} and {planned[1]} questions were planned; release the champion again")
    both = {a.question_id for a in champion.quantized.answers} & {a.question_id for a in challenger.quantized.answers}

    def shared(accuracy: Accuracy) -> Accuracy:
        answers = [a for a in accuracy.answers if a.question_id in both]
        return msgspec.structs.replace(accuracy, answers=answers)

    return compare(shared(champion.quantized), shared(challenger.quantized), _shorter(champion, challenger), planned[0])


def _shorter(*releases: Evidence) -> list[int]:
    """The looks of the one that was stopped first: both had answered the shared questions by then."""
    return min((e.comparison.looks for e in releases), key=lambda looks: looks[-1])


def _accuracy_loss(comparison: Comparison, limit: float, confidence: float, against: Against) -> RuleResult:
    judged = judge_comparison(comparison, LossPolicy(limit, confidence))
    whom = " against the champion" if against == "champion" else ""
    seen = f"The quantized model lost {judged.lost} and gained {judged.gained} of {judged.answered:,} questions{whom}"
    sure = f"with {_percent(confidence)} confidence"
    if judged.decision == "pass":
        reason = f"{sure} it loses at most {points(judged.high)}"
    elif judged.decision == "fail":
        reason = f"{sure} it loses at least {points(judged.low)}"
    else:
        reason = f"{sure} the loss may be anything from {_range(judged.low, judged.high)} points; {missing(judged)}"
    return RuleResult(
        rule="accuracy_loss",
        decision=judged.decision,
        value=points(comparison.loss),
        limit=f"at most {points(limit)}" + (" under the champion" if against == "champion" else ""),
        explanation=f"{seen}; {reason}.",
        against=against,
        interval=f"{_range(judged.low, judged.high)} points",
        arithmetic=arithmetic(judged),
        more_questions=judged.more,
    )


def missing(judged: Judged) -> str:
    """What an inconclusive judgement lacks."""
    if judged.more is None:
        return "it is so close to the limit that more questions will hardly settle it"
    return f"needs about {more_questions(judged.more)}"


def arithmetic(judged: Judged) -> str:
    """How the decision follows from the counts, one step a line."""
    n, b, c = judged.answered, judged.lost, judged.gained
    error = (1 - judged.confidence) / 2
    lines = [
        f"n = {n:,} questions answered by both, b = {b} lost, c = {c} gained",
        f"loss = (b - c) / n = ({b} - {c}) / {n:,} = {points((b - c) / n)}",
    ]
    if judged.answered == judged.planned:
        level = f"z = {judged.z:.3f}"
    else:
        level = f"look at {n:,} of {judged.planned:,} planned questions, so z = {judged.z:.3f}"
    lines.append(f"{level}; either wrong verdict has a probability of at most {_percent(error)}")
    lines.append(
        f"interval (Tango's score, one question of correction) = {_range(judged.low, judged.high)} points; "
        f"limit = {points(judged.limit)}"
    )
    if judged.decision == "pass":
        lines.append(f"{points(judged.high)} <= {points(judged.limit)}: pass")
    elif judged.decision == "fail":
        lines.append(f"{points(judged.low)} > {points(judged.limit)}: fail")
    elif judged.needed is None:
        lines.append("the loss seen is the limit, to within what ten million questions tell apart: inconclusive")
    else:
        lines += _extrapolation(judged, judged.needed)
    return "\n".join(lines)


def _extrapolation(judged: Judged, needed: int) -> list[str]:
    scale = needed / judged.answered
    b, c = judged.lost * scale, judged.gained * scale
    low, high = loss_interval(b, c, needed, judged.z_last, ONE_QUESTION)
    return [
        f"{_signed(judged.low)} <= {_signed(judged.limit)} < {_signed(judged.high)}: inconclusive",
        f"N is the least n at which the interval leaves the limit if the rates hold: b = {b:,.1f}, c = {c:,.1f} of "
        f"N = {needed:,} give {_range(low, high)} points",
        f"N - n = {needed:,} - {judged.answered:,} = {needed - judged.answered:,} more questions",
    ]


def _subject_loss(comparison: Comparison, limit: float, confidence: float, against: Against) -> RuleResult:
    """Fail if a subject's loss is shown to exceed the limit; a small subject can hardly show it, and then passes."""
    z = subject_deviations(comparison, confidence)
    tested = [(s, loss_interval(s.lost, s.gained, s.questions, z, ONE_QUESTION)) for s in comparison.subjects]
    alpha = (1 - confidence) / 2
    worse = [s for s, (low, _) in tested if low > limit and s.p_adjusted <= alpha]
    worst, (low, high) = max(tested, key=lambda pair: (pair[0] in worse, pair[1][0], pair[0].loss))
    decision: Decision = "fail" if worse else "pass"
    counts = f"{worst.lost} lost and {worst.gained} gained of {worst.questions:,}"
    if worse:
        reason = f"Shown to lose more than the limit: {', '.join(subject.subject for subject in worse)}"
    else:
        reason = f"None of {len(tested)} subjects is shown to lose more than the limit"
    reason += f"; the worst is {worst.subject}, {counts}"
    return RuleResult(
        rule="subject_loss",
        decision=decision,
        value=f"{worst.subject}: {points(worst.loss)}",
        limit=f"at most {points(limit)}" + (" under the champion" if against == "champion" else ""),
        explanation=f"{reason}.",
        against=against,
        interval=f"{_range(low, high)} points, for {len(tested)} subjects at once",
        arithmetic="\n".join(
            [
                f"{len(tested)} subjects; to be named, a subject needs a lower end above {points(limit)} (each at "
                f"{_percent(alpha)} / {len(tested)}) and Holm's adjusted p of the exact one-sided McNemar test at most "
                f"{alpha:g}",
                *(
                    f"{s.subject}: n = {s.questions}, b = {s.lost}, c = {s.gained}, loss {points(s.loss)} "
                    f"({_range(*ends)}), p = {s.p_value:.3g}, adjusted {s.p_adjusted:.3g}"
                    for s, ends in sorted(tested, key=lambda pair: pair[0].p_value)
                ),
            ]
        ),
    )


def subject_deviations(comparison: Comparison, confidence: float) -> float:
    """Standard deviations of each subject's interval, so that all hold at once; a stage holds subjects in their shares,
    so that each has been looked at as far as the whole."""
    looks = comparison.looks or [comparison.questions]
    planned = comparison.planned or comparison.questions
    return deviation_at(looks, planned, 1 - (1 - confidence) / len(comparison.subjects))


def points(fraction: float) -> str:
    """A difference of accuracies, in percentage points."""
    return f"{_signed(fraction)} points"


def _range(low: float, high: float) -> str:
    return f"{_signed(low)} to {_signed(high)}"


def _signed(fraction: float) -> str:
    """In percent, with a typographic minus, and zero without a sign."""
    return f"{100 * fraction:.2f}".replace("-0.00", "0.00").replace("-", "−")


def _percent(fraction: float) -> str:
    return f"{round(100 * fraction, 6):g} %"


def more_questions(count: int) -> str:
    """`1,500 more questions`, of a number that is an estimate."""
    return f"{rounded_up(count):,} more question{'s' if count > 1 else ''}"


def rounded_up(count: int) -> int:
    """To two significant digits: an estimate should not look exact."""
    step: int = 10 ** max(len(str(count)) - 2, 0)
    return -(-count // step) * step
