"""The gate says pass, fail or inconclusive, with a reason, and never contradicts itself."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightship.eval.comparison import loss_interval, mcnemar_p_value
from lightship.eval.gate import decide
from lightship.recipe import Gate
from lightship.records import AnsweredQuestion, Comparison, RuleResult, Verdict
from tests.eval.release import GATE, accuracy, fidelity, plan, throughput, verification

RANK = {"fail": 0, "inconclusive": 1, "pass": 2}


def paired(lost: int, gained: int, n: int) -> Comparison:
    """Of n questions, `lost` are answered by the source only and `gained` by the quantized model only."""
    low, high = loss_interval(lost, gained, n)
    return Comparison(
        questions=n, source_accuracy=1 - gained / n, quantized_accuracy=1 - lost / n, lost=["x"] * lost,
        gained=["y"] * gained, loss=(lost - gained) / n, loss_low=low, loss_high=high,
        p_value=mcnemar_p_value(lost, gained),
    )  # fmt: skip


GOOD: dict[str, Any] = {
    "plan": plan(),
    "verification": verification(),
    "comparison": paired(3, 3, 1000),
    "quantized": accuracy([True] * 10),
    "fidelity": fidelity(),
    "throughput": throughput(),
}


def judge(gate: Gate, **changed: Any) -> Verdict:
    return decide(gate, **GOOD | changed)


def rule(name: str, gate: Gate, **changed: Any) -> RuleResult:
    return next(r for r in judge(gate, **changed).rules if r.rule == name)


def test_a_good_release_passes_every_rule() -> None:
    verdict = judge(GATE)
    assert verdict.decision == "pass"
    assert [r.rule for r in verdict.rules] == [
        "verification",
        "accuracy_loss",
        "kl",
        "truncated",
        "unparsed",
        "experts_shrink",
        "throughput_ratio",
    ]


def test_a_rule_that_is_not_set_does_not_apply_but_verification_always_does() -> None:
    verdict = judge(Gate(), verification=verification(passed=False))
    assert [(r.rule, r.decision) for r in verdict.rules] == [("verification", "fail")]
    assert "every scale is finite" in verdict.rules[0].explanation
    assert verdict.decision == "fail"


def test_a_small_sample_is_inconclusive_and_says_how_many_questions_are_missing() -> None:
    result = rule("accuracy_loss", GATE, comparison=paired(2, 1, 100))
    assert result.decision == "inconclusive"
    assert "lost 2 and gained 1 of 100 questions" in result.explanation
    assert "needs about 1,300 more questions" in result.explanation


def test_a_large_loss_fails_and_says_at_least_how_much_was_lost() -> None:
    result = rule("accuracy_loss", GATE, comparison=paired(90, 5, 1000))
    assert result.decision == "fail"
    assert "loses at least 6." in result.explanation


def test_a_loss_right_at_the_limit_does_not_promise_that_more_questions_help() -> None:
    result = rule("accuracy_loss", GATE, comparison=paired(20, 0, 1000))
    assert result.decision == "inconclusive"
    assert "more questions will hardly settle it" in result.explanation


def test_one_failure_outweighs_doubt_and_doubt_outweighs_success() -> None:
    doubtful = paired(2, 1, 100)
    assert judge(GATE, comparison=doubtful).decision == "inconclusive"
    assert judge(GATE, comparison=doubtful, fidelity=fidelity(kl=1.0)).decision == "fail"


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("kl", {"fidelity": fidelity(kl=0.2)}),
        ("experts_shrink", {"plan": plan(experts_after=90_000_000)}),
        ("throughput_ratio", {"throughput": throughput(0.8)}),
    ],
)
def test_each_measure_fails_alone(name: str, bad: dict[str, Any]) -> None:
    assert [r.rule for r in judge(GATE, **bad).rules if r.decision == "fail"] == [name]


@pytest.mark.parametrize(("name", "change"), [("truncated", {"truncated": True}), ("unparsed", {"predicted": None})])
def test_format_drift_is_a_failure_of_its_own(name: str, change: dict[str, Any]) -> None:
    answers: list[AnsweredQuestion] = [msgspec.structs.replace(a, **change) for a in accuracy([True] * 10).answers]
    drifted = msgspec.structs.replace(accuracy([True]), answers=answers)
    assert rule(name, GATE, quantized=drifted).value == "100.0 %"
    assert judge(GATE, quantized=drifted).decision == "fail"


@given(st.integers(0, 40), st.integers(0, 40), st.integers(80, 2000), st.floats(0, 0.2), st.floats(0, 0.2))
def test_a_larger_limit_is_never_stricter(lost: int, gained: int, n: int, one: float, other: float) -> None:
    comparison = paired(lost, gained, n)
    strict, lax = (
        rule("accuracy_loss", Gate(accuracy_loss=limit), comparison=comparison).decision
        for limit in sorted((one, other))
    )
    assert RANK[strict] <= RANK[lax]


@given(st.integers(0, 30), st.integers(0, 30), st.integers(100, 1000), st.floats(0, 0.1))
def test_one_more_lost_question_is_never_a_better_verdict(lost: int, gained: int, n: int, limit: float) -> None:
    better, worse = (
        rule("accuracy_loss", Gate(accuracy_loss=limit), comparison=paired(k, gained, n)).decision
        for k in (lost, lost + 1)
    )
    assert RANK[worse] <= RANK[better]


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 2), st.floats(0, 1))
def test_the_overall_decision_is_the_worst_of_the_rules(loss: float, kl: float, ratio: float, shrink: float) -> None:
    verdict = judge(Gate(accuracy_loss=loss, kl=kl, throughput_ratio=ratio, experts_shrink=shrink))
    assert verdict.decision == min((r.decision for r in verdict.rules), key=RANK.__getitem__)
    assert all(r.explanation.endswith(".") and r.value and r.limit for r in verdict.rules)
