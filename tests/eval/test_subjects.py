"""Whether a subject got worse is asked of each, and answered for all together."""

import random

import msgspec
import pytest

from lightship.eval.subjects import compare_subjects, holm, worse_p_value
from lightship.records import AnsweredQuestion, SubjectLoss

SUBJECTS = [f"subject {i:02}" for i in range(14)]


def answered(subject: str, number: int, correct: bool) -> AnsweredQuestion:
    return AnsweredQuestion(
        question_id=f"{subject} {number}", category=subject, answer="A", predicted="A" if correct else "B",
        correct=correct, truncated=False, text="",
    )  # fmt: skip


def subjects(lost: dict[str, int], gained: dict[str, int], questions: int = 60) -> list[SubjectLoss]:
    """Fourteen subjects of which these many questions are lost and gained; the others are answered by both."""
    pairs = []
    for subject in SUBJECTS:
        b, c = lost.get(subject, 0), gained.get(subject, 0)
        for i in range(questions):
            before = answered(subject, i, not b <= i < b + c)
            pairs.append((before, msgspec.structs.replace(before, correct=i >= b)))
    return compare_subjects(pairs)


def test_a_subject_that_collapsed_is_named_and_the_others_are_not() -> None:
    found = subjects({"subject 03": 15, "subject 05": 3}, {"subject 05": 2})
    assert [s.subject for s in found if s.p_adjusted <= 0.05] == ["subject 03"]
    collapsed = found[3]
    assert (collapsed.lost, collapsed.gained, collapsed.loss) == (15, 0, 0.25)
    assert collapsed.loss_low > 0


def test_mcnemar_asks_for_worse_only() -> None:
    from scipy.stats import binomtest

    for lost, gained in [(0, 0), (5, 0), (0, 5), (8, 3)]:
        exact = binomtest(lost, lost + gained, alternative="greater").pvalue if lost + gained else 1.0
        assert worse_p_value(lost, gained) == pytest.approx(exact)


def test_holm_steps_down_and_keeps_the_order() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]


def test_fourteen_subjects_that_did_not_change_are_hardly_ever_called_worse() -> None:
    rng = random.Random(2)
    alone = together = 0
    trials = 400
    for _ in range(trials):
        counts = [
            (sum(rng.random() < 0.05 for _ in range(100)), sum(rng.random() < 0.05 for _ in range(100)))
            for _ in SUBJECTS
        ]
        p_values = [worse_p_value(b, c) for b, c in counts]
        alone += min(p_values) <= 0.05
        together += min(holm(p_values)) <= 0.05
    assert alone / trials > 0.2, "one by one they would be, which is what the adjustment is for"
    assert together / trials <= 0.05
