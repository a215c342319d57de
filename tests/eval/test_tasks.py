"""Any lm-eval task can be named: its own prompts, filters and metrics, on its own data or on a local copy of it."""

import json
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from lightship.errors import EvaluationError
from lightship.eval.accuracy import evaluate
from lightship.eval.tasks import load_task
from lightship.files import read_json, write_json
from lightship.recipe import AccuracyTask, TaskSource
from lightship.records import Accuracy
from tests.eval.stub_server import Reply, serving


def write_split(folder: Path, split: str, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def gsm8k(tmp_path: Path) -> Path:
    folder = tmp_path / "gsm8k-copy"
    for split, first in (("train", 100), ("test", 0)):
        numbers = range(first, first + 8)
        rows = [{"question": f"What is {n} + 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"} for n in numbers]
        write_split(folder, split, rows)
    return folder


@pytest.fixture
def arc(tmp_path: Path) -> Path:
    choices = {"text": ["red", "a very long colour"], "label": ["A", "B"]}
    rows = [{"id": str(n), "question": f"Colour {n}?", "choices": choices, "answerKey": "A"} for n in range(4)]
    for split in ("train", "validation", "test"):
        write_split(tmp_path / "arc-copy", split, rows)
    return tmp_path / "arc-copy"


def adds(prompt: str) -> Reply:
    last = prompt.rpartition("What is ")[2]
    number = int(last.partition(" ")[0]) if last[0].isdigit() else 0
    return f" It is {number + 1}.\n#### {number + 1 if number % 2 else 0}", "length" if number == 3 else "stop"


def asking(questions: Path, *tasks: str | TaskSource, **settings: Any) -> AccuracyTask:
    return AccuracyTask(questions=str(questions), max_tokens=64, concurrency=4, tasks=list(tasks), **settings)


def test_gsm8k_on_a_local_copy_has_its_own_prompts_filters_and_metrics(
    gsm8k: Path, questions: Path, tokenizer: Path, tmp_path: Path
) -> None:
    with serving(tokenizer, adds) as server:
        source = TaskSource(name="gsm8k", path=str(gsm8k))
        accuracy = evaluate(server.endpoint, asking(questions, source), tmp_path / "work")
    (result,) = accuracy.tasks
    prompts = [p for p in server.prompts if p.startswith("Question: What is ")]
    assert len(prompts) == 8
    assert all(p.count("\nAnswer: ") == 5 and p.endswith("+ 1?\nAnswer:") for p in prompts)
    assert result.task == "gsm8k"
    assert result.metrics == {"exact_match/strict-match": 0.5, "exact_match/flexible-extract": 0.5}
    assert result.overrides.keys() == {"dataset"}
    assert [s.document for s in result.samples if s.truncated] == [3]
    sample = result.samples[1]
    assert sample.parsed == {"strict-match": "2", "flexible-extract": "2"}
    assert sample.metrics == {"exact_match/strict-match": 1.0, "exact_match/flexible-extract": 1.0}
    assert (sample.answers, len(sample.prompt_digest)) == ([" It is 2.\n#### 2"], 64)
    assert len(accuracy.answers) == 9, "MMLU-Pro's questions stand beside it"


def test_a_choice_by_log_probability_is_asked_of_the_prompt_and_resumed(
    arc: Path, questions: Path, tokenizer: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    task = asking(questions, TaskSource(name="arc_easy", path=str(arc)))
    with serving(tokenizer) as server:
        (result,) = evaluate(server.endpoint, task, tmp_path / "work").tasks
        asked = len(server.bodies)
        assert evaluate(server.endpoint, task, tmp_path / "work").tasks == [result]
        assert len(server.bodies) == asked == 9 + 8
    assert capfd.readouterr() == ("", ""), "no bar of lm-eval's"
    assert {body["echo"] for body in server.bodies if "echo" in body} == {True}
    assert result.metrics["acc/none"] == 1.0, "every token costs the same, so the short answer wins"
    assert len(result.samples[0].answers) == 2


def test_a_limit_draws_the_same_documents_each_time(
    gsm8k: Path, questions: Path, tokenizer: Path, tmp_path: Path
) -> None:
    source = TaskSource(name="gsm8k", path=str(gsm8k), limit=3)
    with serving(tokenizer, adds) as server:
        results = [evaluate(server.endpoint, asking(questions, source), tmp_path / str(n)).tasks for n in range(2)]
        other = evaluate(server.endpoint, asking(questions, source, seed=5), tmp_path / "seed").tasks
    assert results[0] == results[1]
    assert results[0][0].overrides["limit"] == "3 of 8, seed 0"
    assert len(results[0][0].samples) == 3
    assert [s.document for s in results[0][0].samples] != [s.document for s in other[0].samples]
    assert all(f"What is {s.document} +" in "".join(server.prompts) for s in results[0][0].samples)


def test_a_reasoning_model_gets_room_in_every_task_and_its_thinking_is_stripped(
    gsm8k: Path, questions: Path, tokenizer: Path, tmp_path: Path
) -> None:
    thinks = lambda prompt: ("<think>Question: #### 7</think>" + adds(prompt)[0], "stop")  # noqa: E731
    limits = []
    for max_tokens in (64, 4096):
        with serving(tokenizer, thinks) as server:
            source = TaskSource(name="gsm8k", path=str(gsm8k))
            task = replace(asking(questions, source, reasoning=True), max_tokens=max_tokens)
            (result,) = evaluate(server.endpoint, task, tmp_path / f"work-{max_tokens}").tasks
        pairs = zip(server.bodies, server.prompts, strict=True)
        limits += [(b["max_tokens"], "stop" in b) for b, p in pairs if p.startswith("Question: What is ")]
    assert limits == [(256, False)] * 8 + [(4096, False)] * 8, "lm-eval's own limit where that is larger"
    assert result.overrides["max_gen_toks"] == "4096 or more"
    assert result.overrides["thinking"] == "stripped, stop texts applied after it"
    assert result.metrics["exact_match/strict-match"] == 0.5


def test_a_record_with_further_tasks_survives_being_written(
    gsm8k: Path, questions: Path, tokenizer: Path, tmp_path: Path
) -> None:
    with serving(tokenizer, adds) as server:
        task = asking(questions, TaskSource(name="gsm8k", path=str(gsm8k)))
        accuracy = evaluate(server.endpoint, task, tmp_path)
    write_json(tmp_path / "accuracy.json", accuracy)
    assert read_json(tmp_path / "accuracy.json", Accuracy) == accuracy


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (TaskSource(name="gsm8q"), r"no task 'gsm8q'; the nearest are .*gsm8k"),
        (TaskSource(name="gsm8k"), r"the data of the task 'gsm8k' is not on this machine.*HF_HUB_OFFLINE"),
        (TaskSource(name="mmlu", path="x"), "'mmlu' is a group"),
        (TaskSource(name="gsm8k", path="/nowhere"), "holds no .jsonl or .parquet file"),
    ],
)
def test_a_task_that_cannot_be_had_says_why(source: TaskSource, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        load_task(source, 0)


def test_a_folder_without_the_tasks_splits_is_named(tmp_path: Path) -> None:
    folder = write_split(tmp_path, "heldout", [{"question": "?"}])
    with pytest.raises(EvaluationError, match=r"'arc_easy' reads the splits test, validation, and .* has heldout"):
        load_task(TaskSource(name="arc_easy", path=str(folder)), 0)


def test_rows_without_a_tasks_columns_are_named(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_split(tmp_path, split, [{"problem": "1 + 1"}])
    with pytest.raises(EvaluationError, match=r"not those of the task 'arc_easy'.*columns problem"):
        load_task(TaskSource(name="arc_easy", path=str(tmp_path)), 0)


def test_the_chat_api_refuses_tasks_of_log_probabilities(arc: Path, questions: Path) -> None:
    with pytest.raises(EvaluationError, match="'arc_easy' compares log-probabilities"):
        load_task(TaskSource(name="arc_easy", path=str(arc)), 0, asking(questions, api="chat"))


def test_a_task_whose_package_is_missing_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "langdetect", None)
    with pytest.raises(EvaluationError, match="'ifeval' needs the package langdetect: pip install langdetect"):
        load_task(TaskSource(name="ifeval", path=str(write_split(tmp_path, "train", [{"prompt": "?"}]))), 0)


def test_ifeval_on_a_local_copy_checks_the_instructions(questions: Path, tokenizer: Path, tmp_path: Path) -> None:
    pytest.importorskip("langdetect")
    pytest.importorskip("immutabledict")
    rows = [
        {"key": n, "prompt": "No commas, please.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
        for n in range(2)
    ]
    folder = write_split(tmp_path / "ifeval", "train", rows)
    with serving(tokenizer, lambda _: ("None here", "stop")) as server:
        task = asking(questions, TaskSource(name="ifeval", path=str(folder)))
        (result,) = evaluate(server.endpoint, task, tmp_path / "work").tasks
    assert result.metrics["prompt_level_strict_acc/none"] == 1.0
