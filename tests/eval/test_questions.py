"""Question directories are checked before any model is asked, and a limited draw is fair and repeatable."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightship.errors import EvaluationError
from lightship.eval.questions import Question, draw, draw_evenly, read_questions
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


@pytest.mark.parametrize("layout", ["{}.parquet", "data/{}-00000-of-00001.parquet"])
def test_parquet_and_the_hubs_layout_hold_the_same_questions(layout: str, questions: Path, tmp_path: Path) -> None:
    import datasets

    for split in ("test", "validation"):
        path = tmp_path / "copy" / layout.format(split)
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [json.loads(line) for line in (questions / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        datasets.Dataset.from_list(rows).to_parquet(path)
    assert read_questions(tmp_path / "copy") == read_questions(questions)


def test_a_missing_part_of_a_split_is_named(questions: Path) -> None:
    (questions / "test.jsonl").unlink()
    (questions / "test-00000-of-00002.parquet").write_bytes(b"")
    with pytest.raises(EvaluationError, match=r"test-00001-of-00002\.parquet is missing"):
        read_questions(questions)


def test_an_unreadable_parquet_file_is_named(questions: Path) -> None:
    (questions / "test.jsonl").rename(questions / "test.parquet")
    with pytest.raises(EvaluationError, match=r"test\.parquet is not a readable parquet file"):
        read_questions(questions)


def test_a_line_that_is_not_json_is_named(questions: Path) -> None:
    with (questions / "test.jsonl").open("a") as file:
        file.write('{"question_id": 7\n')
    with pytest.raises(EvaluationError, match=r"test\.jsonl:10 is not a JSON object"):
        read_questions(questions)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "E"}, "the answer 'E' is the letter of none of its 4 options"),
        ({"answer": "b"}, "the answer 'b'"),
        ({"options": []}, "has 0 options"),
        ({"options": [str(n) for n in range(11)]}, "has 11 options"),
    ],
)
def test_a_question_that_the_prompt_cannot_hold_is_named(change: dict[str, Any], message: str, questions: Path) -> None:
    with (questions / "test.jsonl").open("a") as file:
        file.write(json.dumps(row(77, "biology") | change) + "\n")
    with pytest.raises(EvaluationError, match=rf"test\.jsonl:10.*{message}"):
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


def test_an_even_draw_of_many_names_takes_each_ones_share() -> None:
    drawn = draw_evenly({"a": 10, "b": 30}, 8, 0)
    assert {name: len(of) for name, of in drawn.items()} == {"a": 2, "b": 6}
    assert all(of == sorted(set(of)) for of in drawn.values())
