"""The gate says pass, fail or inconclusive, with a reason, and never contradicts itself."""

from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightship.eval.comparison import mcnemar_p_value
from lightship.eval.gate import decide
from lightship.eval.interval import loss_interval
from lightship.eval.measures import Evidence
from lightship.eval.sequential import LossPolicy
from lightship.eval.sequential import judge as judge_counts
from lightship.policy import AtLeast, AtMost, Gate, GpuFit, check_gate
from lightship.records import AnsweredQuestion, Comparison, RuleResult, Verdict
from tests.eval.release import GATE, accuracy, calibration, evidence, fidelity, plan, throughput, verification

RANK = {"fail": 0, "inconclusive": 1, "pass": 2}
STRICT = Gate(
    accuracy_loss=0.02, subject_loss=0.05, kl=0.05, kl_worst_scene=0.05, top1_agreement=0.9, truncated=0.02,
    unparsed=0.02, starved_experts=0.4, throughput_ratio=1.0, ttft_ratio=1.0, bytes_after=8e7, experts_shrink=0.4,
    fit=GpuFit(gpu="80 GB", cache_tokens=1000),
)  # fmt: skip


def paired(lost: int, gained: int, n: int, **staged: Any) -> Comparison:
    """Of n questions, `lost` are answered by the source only and `gained` by the quantized model only."""
    low, high = loss_interval(lost, gained, n)
    return Comparison(
        questions=n, source_accuracy=1 - gained / n, quantized_accuracy=1 - lost / n, lost=["x"] * lost,
        gained=["y"] * gained, loss=(lost - gained) / n, loss_low=low, loss_high=high,
        p_value=mcnemar_p_value(lost, gained), **staged,
    )  # fmt: skip


GOOD = evidence(comparison=paired(3, 3, 1000))
"""Made once, since hypothesis asks hundreds of times."""


def judge(gate: Gate, champion: Evidence | None = None, **changed: Any) -> Verdict:
    return decide(gate, replace(GOOD, **changed), champion)


def rule(name: str, gate: Gate, champion: Evidence | None = None, **changed: Any) -> RuleResult:
    return next(r for r in judge(gate, champion, **changed).rules if r.rule == name)


def answers(wrong: int, questions: int = 1000) -> Any:
    return accuracy([i >= wrong for i in range(questions)])


def test_a_good_release_passes_every_rule() -> None:
    verdict = decide(STRICT, evidence())
    assert [(r.rule, r.decision) for r in verdict.rules if r.decision != "pass"] == []
    assert verdict.decision == "pass"
    shown = [r.rule for r in verdict.rules]
    assert sorted(shown) == sorted(["verification", *(f for f in Gate.__struct_fields__ if f != "confidence")])


def test_a_rule_that_is_not_set_does_not_apply_but_verification_always_does() -> None:
    verdict = judge(Gate(), verification=verification(passed=False))
    assert [(r.rule, r.decision) for r in verdict.rules] == [("verification", "fail")]
    assert "every scale is finite" in verdict.rules[0].explanation
    assert verdict.decision == "fail"


def test_fifty_questions_are_too_few_and_the_verdict_says_how_many_are_missing() -> None:
    verdict = judge(Gate(accuracy_loss=0.02), comparison=paired(1, 0, 50))
    (result,) = (r for r in verdict.rules if r.rule == "accuracy_loss")
    assert verdict.decision == result.decision == "inconclusive"
    assert "lost 1 and gained 0 of 50 questions" in result.explanation
    assert verdict.more_questions == result.more_questions


def test_the_arithmetic_leads_from_the_counts_to_the_number_of_questions() -> None:
    result = rule("accuracy_loss", GATE, comparison=paired(2, 1, 100))
    assert result.arithmetic is not None
    assert result.arithmetic.splitlines() == [
        "n = 100 questions answered by both, b = 2 lost, c = 1 gained",
        "loss = (b - c) / n = (2 - 1) / 100 = 1.00 points",
        "z = 1.960; either wrong verdict has a probability of at most 2.5 %",
        "interval (Tango's score, one question of correction) = −5.18 to 7.56 points; limit = 2.00 points",
        "−5.18 <= 2.00 < 7.56: inconclusive",
        "N is the least n at which the interval leaves the limit if the rates hold: b = 30.8, c = 15.4 of N = 1,542 "
        "give 0.07 to 2.00 points",
        "N - n = 1,542 - 100 = 1,442 more questions",
    ]
    assert "needs about 1,500 more questions" in result.explanation


def test_a_large_loss_fails_and_says_at_least_how_much_was_lost() -> None:
    result = rule("accuracy_loss", GATE, comparison=paired(90, 5, 1000))
    assert result.decision == "fail"
    assert "loses at least 6." in result.explanation


def test_a_loss_right_at_the_limit_does_not_promise_that_more_questions_help() -> None:
    result = rule("accuracy_loss", GATE, comparison=paired(20, 0, 1000))
    assert result.decision == "inconclusive"
    assert result.more_questions is None
    assert "more questions will hardly settle it" in result.explanation


def test_more_confidence_asks_for_more_evidence() -> None:
    comparison = paired(6, 3, 1000)
    assert rule("accuracy_loss", Gate(accuracy_loss=0.013), comparison=comparison).decision == "pass"
    assert rule("accuracy_loss", Gate(accuracy_loss=0.013, confidence=0.999), comparison=comparison).decision != "pass"


def test_an_early_look_is_judged_by_its_own_stricter_interval() -> None:
    fixed, early = paired(6, 3, 1000), paired(6, 3, 1000, looks=[1000], planned=4000)
    assert rule("accuracy_loss", Gate(accuracy_loss=0.013), comparison=fixed).decision == "pass"
    result = rule("accuracy_loss", Gate(accuracy_loss=0.013), comparison=early)
    assert result.decision == "inconclusive"
    assert "look at 1,000 of 4,000 planned questions, so z = 4.333" in (result.arithmetic or "")


def test_a_subject_that_collapses_fails_where_the_whole_does_not() -> None:
    right = [True] * 1000
    for i in range(0, 250, 5):
        right[i] = False
    before, after = accuracy([True] * 1000), accuracy(right)
    made = evidence(source=before, quantized=after)
    verdict = decide(Gate(accuracy_loss=0.08, subject_loss=0.05), made)
    assert {r.rule: r.decision for r in verdict.rules} == {
        "verification": "pass", "accuracy_loss": "pass", "subject_loss": "fail",
    }  # fmt: skip
    assert "Shown to lose more than the limit: arithmetic; the worst is" in verdict.rules[2].explanation


def test_one_failure_outweighs_doubt_and_doubt_outweighs_success() -> None:
    doubtful = paired(2, 1, 100)
    assert judge(GATE, comparison=doubtful).decision == "inconclusive"
    assert judge(GATE, comparison=doubtful, fidelity=fidelity(kl=1.0)).decision == "fail"


@pytest.mark.parametrize(
    ("names", "bad"),
    [
        (["kl", "kl_worst_scene"], {"fidelity": fidelity(kl=0.2)}),
        (["experts_shrink", "bytes_after"], {"plan": plan(experts_after=90_000_000)}),
        (["throughput_ratio", "ttft_ratio"], {"throughput": throughput(0.8)}),
        (["starved_experts"], {"calibration": msgspec.structs.replace(calibration(), token_floor=10**6)}),
    ],
)
def test_each_measure_fails_by_its_own_rules_alone(names: list[str], bad: dict[str, Any]) -> None:
    assert sorted(r.rule for r in decide(STRICT, evidence(**bad)).rules if r.decision == "fail") == sorted(names)


@pytest.mark.parametrize(("name", "change"), [("truncated", {"truncated": True}), ("unparsed", {"predicted": None})])
def test_format_drift_is_a_failure_of_its_own(name: str, change: dict[str, Any]) -> None:
    drifted_answers: list[AnsweredQuestion] = [
        msgspec.structs.replace(a, **change) for a in accuracy([True] * 10).answers
    ]
    drifted = msgspec.structs.replace(accuracy([True]), answers=drifted_answers)
    assert rule(name, GATE, quantized=drifted).value == "100.0 %"
    assert judge(GATE, quantized=drifted).decision == "fail"


def test_failed_requests_make_the_ratio_worthless() -> None:
    made = throughput()
    loads = [msgspec.structs.replace(made.loads[0], errors=3), *made.loads[1:]]
    result = rule("throughput_ratio", GATE, throughput=msgspec.structs.replace(made, loads=loads))
    assert result.decision == "fail"
    assert "3 requests failed" in result.explanation


@pytest.mark.parametrize(
    ("gpu", "cache", "decision"), [("80 GB", 1000, "pass"), ("80 GB", 10**9, "fail"), ("12 GB", 1, "fail")]
)
def test_the_result_must_fit_and_leave_room(gpu: str, cache: int, decision: str) -> None:
    assert rule("fit", Gate(fit=GpuFit(gpu=gpu, cache_tokens=cache))).decision == decision


def test_one_rule_may_be_absolute_and_relative_to_source_and_champion() -> None:
    whole = accuracy([True] * 100)
    some = [msgspec.structs.replace(a, truncated=i < 3) for i, a in enumerate(whole.answers)]
    cut = msgspec.structs.replace(whole, answers=some)
    champion = evidence(release_id="c0ffee", source=accuracy([True] * 100), quantized=accuracy([True] * 100))
    gate = Gate(truncated=AtMost(at_most=0.05, over_source=0.01, over_champion=0.04))
    verdict = decide(gate, evidence(source=accuracy([True] * 100), quantized=cut), champion)
    assert [(r.rule, r.against, r.decision) for r in verdict.rules[1:]] == [
        ("truncated", "limit", "pass"), ("truncated", "source", "fail"), ("truncated", "champion", "pass"),
    ]  # fmt: skip
    assert verdict.rules[2].limit == "at most 1.0 % above the source's 0.0 %"
    assert "the champion c0ffee has 0.0 %" in verdict.rules[3].explanation
    assert verdict.champion == "c0ffee"


def test_a_value_that_is_the_limit_meets_it() -> None:
    whole = accuracy([True] * 1000)

    def unread(count: int) -> Any:
        some = [msgspec.structs.replace(a, predicted=None if i < count else "B") for i, a in enumerate(whole.answers)]
        return msgspec.structs.replace(whole, answers=some)

    gate = Gate(unparsed=AtMost(over_source=0.2))
    assert 0.1 + 0.2 != 0.3
    for count, decision in ((300, "pass"), (301, "fail")):
        assert rule("unparsed", gate, source=unread(100), quantized=unread(count)).decision == decision


def test_without_a_champion_its_rules_pass_and_say_so() -> None:
    gate = Gate(accuracy_loss=AtMost(at_most=0.02, over_champion=0.01), kl=AtMost(at_most=0.05, over_champion=0.01))
    verdict = judge(gate)
    assert verdict.decision == "pass"
    told = [r.explanation for r in verdict.rules if r.against == "champion"]
    assert len(told) == 2
    assert all("no champion yet" in text for text in told)


def test_a_loss_against_the_champion_is_paired_with_the_champions_answers() -> None:
    gate = Gate(accuracy_loss=AtMost(at_most=0.3, over_champion=0.02))
    source, champion = answers(0), evidence(release_id="c0ffee", source=answers(0), quantized=answers(10))
    verdict = decide(gate, evidence(source=source, quantized=answers(110)), champion)
    assert [r.decision for r in verdict.rules[1:]] == ["pass", "fail"]
    assert "lost 100 and gained 0 of 1,000 questions against the champion" in verdict.rules[2].explanation


def test_a_champion_that_was_asked_other_questions_decides_nothing() -> None:
    gate = Gate(accuracy_loss=AtMost(at_most=0.02, over_champion=0.02), kl=AtMost(at_most=1.0, over_champion=0.1))
    other = evidence(release_id="c0ffee", source=answers(0, 900), quantized=answers(0, 900), fidelity=longer())
    verdict = decide(gate, evidence(), other)
    assert [r.decision for r in verdict.rules if r.against == "champion"] == ["inconclusive", "inconclusive"]
    assert verdict.more_questions is None


def longer() -> Any:
    made = fidelity()
    return msgspec.structs.replace(made, scenes=[msgspec.structs.replace(s, tokens=9) for s in made.scenes])


def test_releases_that_stopped_at_different_stages_are_compared_on_what_both_answered() -> None:
    short = answers(0, 500)
    stopped = evidence(
        release_id="c0ffee", source=short, quantized=short, comparison=paired(0, 0, 500, looks=[500], planned=2000)
    )
    later = evidence(comparison=paired(0, 0, 1000, looks=[500, 1000], planned=2000))
    verdict = decide(Gate(accuracy_loss=AtMost(at_most=0.1, over_champion=0.05)), later, stopped)
    against = verdict.rules[2]
    assert against.decision == "pass"
    assert "look at 500 of 2,000 planned questions" in (against.arithmetic or "")


def test_a_value_that_is_better_large_may_be_held_against_the_source() -> None:
    gate = Gate(top1_agreement=AtLeast(under_source=0.01))
    result = rule("top1_agreement", gate)
    assert result.decision == "fail"
    assert result.limit == "at most 1.0 % below the source's 100.0 %"


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


@pytest.mark.parametrize(
    "gate",
    [{"accuracy_loss": AtMost(at_most=5)}, {"accuracy_loss": 0.01, "top1_agreement": AtLeast(at_least=-3)}]
    + [{"kl": AtMost(at_most=limit)} for limit in (float("nan"), -1, float("inf"))]
    + [{"kl": float("nan")}],
)
def test_a_limit_that_cannot_be_meant_is_refused_in_a_table_as_it_is_alone(gate: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"the gate's {list(gate)[-1]} has a limit of"):
        check_gate(Gate(**gate))


@pytest.mark.parametrize("rule_name", ["kl", "kl_worst_scene", "top1_agreement"])
def test_measures_on_other_text_than_the_champions_decide_nothing(rule_name: str) -> None:
    limits = AtLeast(under_champion=0.1) if rule_name == "top1_agreement" else AtMost(over_champion=0.1)
    other = replace(GOOD, fidelity=msgspec.structs.replace(GOOD.fidelity, text_digest="other text"))
    assert rule(rule_name, Gate(**{rule_name: limits}), champion=GOOD).decision == "pass"
    assert rule(rule_name, Gate(**{rule_name: limits}), champion=other).decision == "inconclusive"


def test_starved_experts_are_counted_on_the_same_calibration_or_decide_nothing() -> None:
    other = replace(GOOD, calibration=msgspec.structs.replace(GOOD.calibration, token_floor=1))
    gate = Gate(starved_experts=AtMost(over_champion=0.0))
    assert rule("starved_experts", gate, champion=GOOD).decision == "pass"
    assert rule("starved_experts", gate, champion=other).decision == "inconclusive"


def test_after_stages_as_many_questions_are_asked_for_as_will_settle_it() -> None:
    looks = [100, 200, 300, 400]
    judged = judge_counts(2, 1, looks, 400, LossPolicy(0.02))
    assert judged.needed is not None
    again = [*looks[:-1], judged.needed]
    b, c = (round(count * judged.needed / 400) for count in (2, 1))
    assert judge_counts(b, c, again, judged.needed, LossPolicy(0.02)).step == "pass"
