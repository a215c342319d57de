"""lm-eval asks exactly the stock MMLU-Pro prompts, and every answer is kept with its letter and its fate."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from lightship.endpoint import Endpoint
from lightship.errors import EvaluationError
from lightship.eval.accuracy import evaluate
from lightship.eval.asking import prompt_digest
from lightship.files import read_json, write_json
from lightship.recipe import AccuracyTask
from lightship.records import Accuracy
from tests.eval.puzzles import write_questions
from tests.eval.stub_server import Reply, serving

SUBJECTS = [
    *("biology", "business", "chemistry", "computer science", "economics", "engineering", "health", "history"),
    *("law", "math", "other", "philosophy", "physics", "psychology"),
]


def task(questions: Path, **settings: Any) -> AccuracyTask:
    return AccuracyTask(questions=str(questions), **{"max_tokens": 64, "concurrency": 4} | settings)


def knows(questions: Path) -> Any:
    """A model that knows the test questions."""
    rows = [json.loads(line) for line in (questions / "test.jsonl").read_bytes().splitlines()]
    answers = {r["question"]: r["answer"] for r in rows}

    def reply(prompt: str) -> Reply:
        last_question = prompt.rpartition("Question:\n")[2].partition("\nOptions:")[0]
        return f" It is plain. The answer is ({answers[last_question]}).", "stop"

    return reply


def stock_prompts(questions: Path, categories: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The prompts of lm-eval's own, unmodified mmlu_pro tasks on the same rows, published as MMLU-Pro is."""
    import datasets
    import lm_eval.tasks

    data = folder / "TIGER-Lab" / "MMLU-Pro" / "data"
    data.mkdir(parents=True)
    for split in ("test", "validation"):
        rows = [json.loads(line) for line in (questions / f"{split}.jsonl").read_bytes().splitlines()]
        datasets.Dataset.from_list(rows).to_parquet(data / f"{split}-00000-of-00001.parquet")
    monkeypatch.chdir(folder)
    manager = lm_eval.tasks.TaskManager(
        include_defaults=False, include_path=str(Path(lm_eval.tasks.__file__).parent / "mmlu_pro")
    )
    prompts = set()
    for category in categories:
        (stock,) = manager.load([f"mmlu_pro_{category.replace(' ', '_')}"])["tasks"].values()
        stock.set_fewshot_seed(1234)
        stock.build_all_requests()
        prompts |= {instance.args[0] for instance in stock.instances}
    return prompts


def test_the_prompts_are_byte_for_byte_the_stock_tasks(
    questions: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = stock_prompts(questions, ["biology", "computer science"], tmp_path / "stock", monkeypatch)
    with serving(tokenizer) as server:
        evaluate(server.endpoint, task(questions), tmp_path / "work")
    assert len(server.prompts) == 9
    assert set(server.prompts) == expected


def test_the_request_is_greedy_stops_where_the_stock_task_stops_and_has_no_bos(
    questions: Path, tokenizer: Path, tmp_path: Path
) -> None:
    with serving(tokenizer) as server:
        evaluate(server.endpoint, task(questions, limit=2), tmp_path)
    body = server.bodies[0]
    assert (body["temperature"], body["stop"], body["max_tokens"]) == (0.0, ["Question:"], 64)
    assert server.prompts[0].startswith("The following are multiple choice questions")


def test_a_model_that_knows_the_answers_gets_all_of_them(questions: Path, tokenizer: Path, tmp_path: Path) -> None:
    with serving(tokenizer, knows(questions)) as server:
        accuracy = evaluate(server.endpoint, task(questions), tmp_path)
    assert (accuracy.task, accuracy.accuracy, accuracy.unparsed, accuracy.truncated) == ("puzzles", 1.0, 0.0, 0.0)
    assert accuracy.by_category() == {"biology": (4, 4), "computer science": (5, 5)}
    assert [a.question_id for a in accuracy.answers] == [str(i) for i in range(9)]
    assert accuracy.answers[1].text == " It is plain. The answer is (B)."


def test_the_record_survives_being_written_and_read(questions: Path, tokenizer: Path, tmp_path: Path) -> None:
    with serving(tokenizer, knows(questions)) as server:
        accuracy = evaluate(server.endpoint, task(questions), tmp_path)
    write_json(tmp_path / "accuracy.json", accuracy)
    assert read_json(tmp_path / "accuracy.json", Accuracy) == accuracy


def test_garbage_is_no_answer_rather_than_a_wrong_letter(questions: Path, tokenizer: Path, tmp_path: Path) -> None:
    with serving(tokenizer, lambda _: ("blah blah (B)", "stop")) as server:
        accuracy = evaluate(server.endpoint, task(questions), tmp_path)
    assert {a.predicted for a in accuracy.answers} == {None}
    assert (accuracy.accuracy, accuracy.unparsed, accuracy.truncated) == (0.0, 1.0, 0.0)


def test_an_answer_cut_by_the_limit_is_marked(questions: Path, tokenizer: Path, tmp_path: Path) -> None:
    reply = lambda prompt: ("thinking" * 8, "length") if "number 3?" in prompt[-200:] else ("answer is B", "stop")  # noqa: E731
    with serving(tokenizer, reply) as server:
        accuracy = evaluate(server.endpoint, task(questions), tmp_path)
    assert [a.question_id for a in accuracy.answers if a.truncated] == ["3"]


def test_one_request_at_a_time_gives_the_same_answers(questions: Path, tokenizer: Path, tmp_path: Path) -> None:
    with serving(tokenizer, knows(questions)) as server:
        together = evaluate(server.endpoint, task(questions), tmp_path)
        alone = evaluate(server.endpoint, task(questions, concurrency=1), tmp_path)
    assert alone.answers == together.answers


def test_a_limit_asks_every_model_the_same_questions(questions: Path, tokenizer: Path, tmp_path: Path) -> None:
    with serving(tokenizer) as one, serving(tokenizer, knows(questions)) as other:
        first = evaluate(one.endpoint, task(questions, limit=4), tmp_path)
        second = evaluate(other.endpoint, task(questions, limit=4), tmp_path)
    assert [a.question_id for a in first.answers] == [a.question_id for a in second.answers]
    assert {c: asked for c, (_, asked) in first.by_category().items()} == {"biology": 2, "computer science": 2}


def test_what_differs_from_the_stock_task_is_recorded(questions: Path, tokenizer: Path, tmp_path: Path) -> None:
    with serving(tokenizer) as server:
        overrides = evaluate(server.endpoint, task(questions, limit=4, seed=7), tmp_path).overrides
        stock = evaluate(server.endpoint, task(questions, max_tokens=2048), tmp_path).overrides
    assert re.fullmatch(r"puzzles sha256:[0-9a-f]{64}", overrides.pop("dataset"))
    assert overrides == {"max_gen_toks": "64", "limit": "4 of 9, seed 7"}
    assert stock.keys() == {"dataset"}


def test_the_hubs_questions_are_asked_where_the_recipe_names_none(
    questions: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    stock = stock_prompts(questions, ["biology", "computer science"], tmp_path / "stock", monkeypatch)
    hub = datasets.load_dataset("parquet", data_dir=str(tmp_path / "stock" / "TIGER-Lab" / "MMLU-Pro" / "data"))
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *what, **more: asked.append((what, more)) or hub)
    monkeypatch.setattr("lightship.eval.accuracy.check_subjects", lambda *_: None)
    with serving(tokenizer, knows(questions)) as server:
        accuracy = evaluate(server.endpoint, AccuracyTask(max_tokens=64, revision="4c2a"), tmp_path / "work")
    assert asked == [(("TIGER-Lab/MMLU-Pro",), {"revision": "4c2a"})]
    assert (accuracy.task, accuracy.accuracy, set(server.prompts)) == ("mmlu_pro", 1.0, stock)


def test_without_the_hub_the_error_says_so_and_what_to_do(tokenizer: Path, tmp_path: Path) -> None:
    with (
        serving(tokenizer) as server,
        pytest.raises(EvaluationError, match=r"TIGER-Lab/MMLU-Pro is not on this machine.*HF_HUB_OFFLINE.*local copy"),
    ):
        evaluate(server.endpoint, AccuracyTask(), tmp_path)


def test_each_answer_carries_the_digest_of_its_prompt(questions: Path, tokenizer: Path, tmp_path: Path) -> None:
    with serving(tokenizer, knows(questions)) as server:
        accuracy = evaluate(server.endpoint, task(questions), tmp_path)
    assert {a.prompt_digest for a in accuracy.answers} == {prompt_digest(prompt) for prompt in server.prompts}
    assert len({a.prompt_digest for a in accuracy.answers}) == 9


def test_mmlu_pro_without_a_subject_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    folder = write_questions(tmp_path / "mmlu_pro", {c: 1 for c in SUBJECTS if c != "law"})
    with serving(tokenizer) as server, pytest.raises(EvaluationError, match="'mmlu_pro' have none about law"):
        evaluate(server.endpoint, task(folder), tmp_path)


def test_all_fourteen_subjects_are_mmlu_pro(tokenizer: Path, tmp_path: Path) -> None:
    folder = write_questions(tmp_path / "mmlu_pro", dict.fromkeys(SUBJECTS, 2))
    with serving(tokenizer, knows(folder)) as server:
        accuracy = evaluate(server.endpoint, task(folder, limit=14), tmp_path)
    assert accuracy.by_category() == dict.fromkeys(sorted(SUBJECTS), (1, 1))


def test_other_questions_cannot_pass_for_mmlu_pro(tokenizer: Path, tmp_path: Path) -> None:
    folder = write_questions(tmp_path / "mmlu_pro", {"riddles": 1})
    with serving(tokenizer) as server, pytest.raises(EvaluationError, match="'riddles' is not one of MMLU-Pro's"):
        evaluate(server.endpoint, task(folder), tmp_path)


def test_an_unreachable_endpoint_is_named_before_lm_eval_starts(questions: Path, tmp_path: Path) -> None:
    endpoint = Endpoint("http://127.0.0.1:9", "tiny", tmp_path)
    with pytest.raises(EvaluationError, match=r"http://127\.0\.0\.1:9/v1/models does not answer"):
        evaluate(endpoint, task(questions), tmp_path)


def test_a_model_that_is_not_served_is_named(questions: Path, tokenizer: Path, tmp_path: Path) -> None:
    with serving(tokenizer) as server, pytest.raises(EvaluationError, match="serves tiny, not huge"):
        evaluate(Endpoint(server.endpoint.base_url, "huge", tokenizer), task(questions), tmp_path)


def test_lm_eval_is_silent_and_caches_nothing(
    questions: Path,
    tokenizer: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with serving(tokenizer) as server, caplog.at_level(logging.DEBUG, logger="lm_eval"):
        evaluate(server.endpoint, task(questions), tmp_path / "work")
    assert capfd.readouterr() == ("", "")
    assert not [r for r in caplog.records if r.name.startswith("lm_eval")]
    assert sorted(p.name for p in (tmp_path / "work").iterdir()) == ["answers.jsonl", "lm-eval.log"]
