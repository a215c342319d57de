"""Questions and a tokenizer that the evaluation tests share."""

from pathlib import Path

import pytest

from tests.eval.puzzles import write_questions
from tests.tiny import write_byte_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(path)
    return path


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return write_questions(tmp_path / "puzzles", {"biology": 4, "computer science": 5})
