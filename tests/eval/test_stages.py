"""Questions come in a fixed order in which every beginning is a small version of the whole."""

from collections import Counter
from dataclasses import dataclass

from lightship.eval.comparison import compare
from lightship.eval.sequential import LossPolicy, judge_comparison
from lightship.eval.stages import StagedAnswers, evaluate_in_stages, stage_ends, stage_order
from lightship.records import Accuracy, AnsweredQuestion

STAGES = [0.25, 0.5, 0.75, 1.0]


@dataclass(frozen=True)
class Asked:
    question_id: int
    category: str


QUESTIONS = [Asked(i, ("law", "law", "law", "physics")[i % 4]) for i in range(800)]


def answers(asked: list[Asked], wrong: set[int]) -> list[AnsweredQuestion]:
    return [
        AnsweredQuestion(
            question_id=str(q.question_id), category=q.category, answer="A", predicted="A",
            correct=q.question_id not in wrong, truncated=False, text="",
        )
        for q in asked
    ]  # fmt: skip


def staged(wrong: set[int], limit: float) -> tuple[StagedAnswers, list[list[Asked]]]:
    """A source that is always right and a result that is not, and the stages that the result was asked."""
    heard: list[list[Asked]] = []

    def ask_quantized(asked: list[Asked]) -> list[AnsweredQuestion]:
        heard.append(asked)
        return answers(asked, wrong)

    found = evaluate_in_stages(QUESTIONS, STAGES, 0, lambda q: answers(q, set()), ask_quantized, LossPolicy(limit))
    return found, heard


def test_the_order_depends_on_questions_and_seed_only() -> None:
    assert stage_order(QUESTIONS, 0) == stage_order(QUESTIONS[::-1], 0)
    assert stage_order(QUESTIONS, 0) != stage_order(QUESTIONS, 1)
    assert sorted(q.question_id for q in stage_order(QUESTIONS, 0)) == list(range(800))


def test_every_beginning_holds_the_subjects_in_their_shares() -> None:
    order = stage_order(QUESTIONS, 0)
    for n in range(1, 800, 37):
        physics = Counter(q.category for q in order[:n])["physics"]
        assert abs(physics - n / 4) <= 1


def test_a_clear_loss_stops_early_and_no_question_is_asked_twice() -> None:
    found, heard = staged(set(range(0, 800, 3)), limit=0.02)
    assert [look.step for look in found.looks] == ["fail"]
    assert [len(stage) for stage in heard] == [200]
    found, heard = staged(set(range(0, 800, 25)), limit=0.03)
    assert found.looks[-1].step == "inconclusive"
    assert [len(stage) for stage in heard] == [200] * 4
    assert len({q.question_id for stage in heard for q in stage}) == 800


def test_the_gate_judges_the_record_as_the_last_look_did() -> None:
    found, _ = staged(set(range(0, 800, 400)), limit=0.04)
    assert found.looks[-1].step == "pass"
    assert found.counts[-1] < 800
    source, quantized = (
        Accuracy(task="t", answers=list(of), overrides={}, seconds=1.0) for of in (found.source, found.quantized)
    )
    record = compare(source, quantized, found.counts, 800)
    judged = judge_comparison(record, LossPolicy(0.04))
    assert (judged.step, judged.z, judged.low, judged.high) == (
        "pass", found.looks[-1].z, found.looks[-1].low, found.looks[-1].high,
    )  # fmt: skip


def test_stages_too_small_to_hold_a_question_are_left_out() -> None:
    assert stage_ends(2, [0.25, 0.5, 0.75, 1.0]) == [1, 2]
    assert stage_ends(1000, [0.1, 1.0]) == [100, 1000]
