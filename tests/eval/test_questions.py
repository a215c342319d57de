"""Question directories are checked before any model is asked, and a limited draw is fair and repeatable."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightship.errors import EvaluationError
from lightship.eval.questions import Question, draw, read_questions
from tests.eval.puzzles import row, write_questions


def many(counts: list[int]) -> list[Question]:
    categories = [f"c{k}" for k, n in enumerate(counts) for _ in range(n)]
    return [
        Question(question_id=i, question="?", options=["x"], answer="A", cot_content="", category=c)
        for i, c in enumerate(categories)
    ]


def test_a_missing_question_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"test\.jsonl does not exist"):
        read_questions(tmp_path)


def test_an_empty_question_file_is_named(questions: Path) -> None:
    (questions / "validation.jsonl").write_text("\n")
    with pytest.raises(EvaluationError, match=r"validation\.jsonl is empty"):
        read_questions(questions)


def test_a_row_outside_the_schema_is_named_by_line(questions: Path) -> None:
    with (questions / "test.jsonl").open("a") as file:
        file.write('{"question_id": 77}\n')
    with pytest.raises(EvaluationError, match=r"test\.jsonl:10 .*`question`"):
        read_questions(questions)


def test_a_category_with_four_worked_examples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="4 rows of category 'biology'"):
        read_questions(write_questions(tmp_path / "q", {"biology": 2}, examples=4))


def test_a_question_id_that_appears_twice_is_refused(questions: Path) -> None:
    with (questions / "test.jsonl").open("a") as file:
        file.write(json.dumps(row(3, "biology")) + "\n")
    with pytest.raises(EvaluationError, match="question_id '3' more than once"):
        read_questions(questions)


@given(counts=st.lists(st.integers(1, 40), min_size=1, max_size=8), share=st.floats(0.01, 1), seed=st.integers(0, 99))
def test_every_category_gets_its_share_within_one_question(counts: list[int], share: float, seed: int) -> None:
    questions = many(counts)
    limit = max(1, round(share * len(questions)))
    drawn = draw(questions, limit, seed)
    assert len(drawn) == limit
    for k, n in enumerate(counts):
        assert abs(sum(q.category == f"c{k}" for q in drawn) - limit * n / len(questions)) < 1


def test_the_same_seed_draws_the_same_questions_and_another_does_not() -> None:
    questions = many([30, 30])
    assert draw(questions, 10, 1) == draw(questions, 10, 1) != draw(questions, 10, 2)


def test_no_limit_asks_everything_in_order() -> None:
    questions = many([3, 4])
    assert draw(questions, None, 0) == draw(questions, 100, 0) == questions
