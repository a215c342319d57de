"""Real MMLU-Pro rows: the prompts are the stock task's to the byte, in all fourteen subjects.

LIGHTSHIP_MMLU_PRO=path/to/mmlu_pro python -m pytest tests/eval/test_mmlu_pro.py
"""

import json
import os
from pathlib import Path

import pytest

from lightship.eval.accuracy import evaluate
from lightship.eval.questions import draw, read_questions
from tests.eval.stub_server import serving
from tests.eval.test_accuracy import SUBJECTS, knows, stock_prompts, task

DATA = os.environ.get("LIGHTSHIP_MMLU_PRO")
QUESTIONS = 140


@pytest.fixture
def subset(tmp_path: Path) -> Path:
    """Ten rows a subject on average, drawn as a limit draws them."""
    if DATA is None:
        pytest.skip("LIGHTSHIP_MMLU_PRO names no folder with MMLU-Pro's splits")
    folder = tmp_path / "mmlu_pro"
    folder.mkdir()
    drawn = {q.question_id for q in draw(read_questions(Path(DATA)).test, QUESTIONS, 0)}
    for split in ("test", "validation"):
        lines = (Path(DATA) / f"{split}.jsonl").read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if split == "validation" or json.loads(line)["question_id"] in drawn]
        (folder / f"{split}.jsonl").write_bytes(b"".join(kept))
    return folder


def test_real_rows_give_the_stock_prompts_and_the_stock_filter_reads_every_answer(
    subset: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = stock_prompts(subset, SUBJECTS, tmp_path / "stock", monkeypatch)
    with serving(tokenizer, knows(subset)) as server:
        accuracy = evaluate(server.endpoint, task(subset, max_tokens=2048), tmp_path / "work")
    assert set(server.prompts) == expected
    assert len(server.prompts) == QUESTIONS
    assert list(accuracy.by_category()) == sorted(SUBJECTS)
    assert (accuracy.accuracy, accuracy.unparsed) == (1.0, 0.0)
    assert accuracy.overrides.keys() == {"dataset"}
