"""Agreement sees every difference between two models' answers, also where both are right or both are wrong."""

import pytest
from msgspec.structs import replace

from lightship.errors import EvaluationError
from lightship.eval.agreement import measure_agreement
from tests.eval.release import accuracy


def test_a_model_agrees_with_itself() -> None:
    one = accuracy([True, False, True])
    found = measure_agreement(one, one)
    assert (found.same_answer, found.same_text, found.common_share) == (1.0, 1.0, 1.0)


def test_answers_of_no_letter_and_no_text_are_alike() -> None:
    one = accuracy([True])
    mute = replace(one, answers=[replace(one.answers[0], predicted=None, text="")])
    assert measure_agreement(mute, mute).common_share == 1.0
    assert measure_agreement(one, mute).same_answer == 0.0


def test_shares_and_prefixes_are_counted_a_question_each() -> None:
    source, quantized = accuracy([True, True, True, True]), accuracy([True, True, True, False])
    texts = ["abcd", "abXX", "abcdef", "b"]
    changed = [replace(a, text=t) for a, t in zip(quantized.answers, texts, strict=True)]
    same = [replace(a, text="abcd") for a in source.answers]
    found = measure_agreement(replace(source, answers=same), replace(quantized, answers=changed))
    assert (found.questions, found.same_answer, found.same_text) == (4, 0.75, 0.25)
    assert found.common_prefix == (4 + 2 + 4 + 0) / 4
    assert found.common_share == pytest.approx((1 + 1 / 2 + 4 / 6 + 0) / 4)


def test_other_questions_are_refused() -> None:
    with pytest.raises(EvaluationError, match="not answer the same questions"):
        measure_agreement(accuracy([True]), accuracy([True, True]))
