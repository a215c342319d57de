"""A killed evaluation goes on where it was: nothing answered is asked again, and the record is as if undisturbed."""

import json
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lightship.eval.accuracy import evaluate
from lightship.eval.asking import prompt_digest
from lightship.files import read_json
from lightship.recipe import AccuracyTask
from lightship.records import Accuracy
from tests.eval.puzzles import write_questions
from tests.eval.stub_server import Stub, serving
from tests.eval.test_accuracy import knows

SCRIPT = """
import sys
from pathlib import Path
from lightship.endpoint import Endpoint
from lightship.eval.accuracy import evaluate
from lightship.files import write_json
from lightship.recipe import AccuracyTask

url, tokenizer, questions, work = sys.argv[1:]
task = AccuracyTask(questions=questions, max_tokens=64, concurrency=4)
write_json(Path(work, "accuracy.json"), evaluate(Endpoint(url, "tiny", Path(tokenizer)), task, Path(work)))
"""
CONCURRENCY = 4
QUESTIONS = {"biology": 20, "law": 20}


def start(server: Stub, questions: Path, work: Path) -> "subprocess.Popen[bytes]":
    where = [server.endpoint.base_url, str(server.endpoint.tokenizer), str(questions), str(work)]
    return subprocess.Popen([sys.executable, "-c", SCRIPT, *where])


def logged(work: Path) -> set[str]:
    """The digests of the prompts that the log has an answer to."""
    lines = (work / "answers.jsonl").read_bytes().split(b"\n")[:-1]
    return {msgspec.json.decode(line)["prompt"] for line in lines}


def without_seconds(accuracy: Accuracy) -> Accuracy:
    return msgspec.structs.replace(accuracy, seconds=0.0)


def test_an_evaluation_killed_again_and_again_asks_no_answered_question_twice(tokenizer: Path, tmp_path: Path) -> None:
    questions, work = write_questions(tmp_path / "puzzles", QUESTIONS), tmp_path / "work"
    work.mkdir()
    settled = []
    with serving(tokenizer, knows(questions), seconds=0.05) as server:
        for kill_at in (1, 13, 30):
            process = start(server, questions, work)
            while len(server.prompts) < kill_at and process.poll() is None:
                time.sleep(0.005)
            process.kill()
            assert process.wait() == -9, "it was killed before it ended"
            answered = logged(work) if (work / "answers.jsonl").exists() else set()
            # Of what was in flight the server may hear yet; what is in the log it has answered before the kill.
            asked_by_then = Counter(prompt_digest(prompt) for prompt in server.prompts)
            settled.append({prompt: asked_by_then[prompt] for prompt in answered})
        assert 30 - 3 * CONCURRENCY <= len(answered) < 40
        assert start(server, questions, work).wait() == 0
        asked = Counter(prompt_digest(prompt) for prompt in server.prompts)
    assert len(asked) == 40
    assert all(asked[prompt] == times for at_kill in settled for prompt, times in at_kill.items())
    assert sum(asked.values()) <= 40 + 3 * CONCURRENCY, "a kill costs what was in flight, and no more"
    with serving(tokenizer, knows(questions)) as server:
        undisturbed = evaluate(
            server.endpoint, AccuracyTask(questions=str(questions), max_tokens=64, concurrency=4), tmp_path / "other"
        )
    assert without_seconds(read_json(work / "accuracy.json", Accuracy)) == without_seconds(undisturbed)


def test_a_finished_evaluation_asks_nothing(questions: Path, tokenizer: Path, tmp_path: Path) -> None:
    task = AccuracyTask(questions=str(questions), max_tokens=64)
    with serving(tokenizer, knows(questions)) as server:
        first = evaluate(server.endpoint, task, tmp_path)
        second = evaluate(server.endpoint, task, tmp_path)
        assert len(server.prompts) == 9
    assert without_seconds(first) == without_seconds(second)


def test_a_larger_limit_asks_only_what_is_new(questions: Path, tokenizer: Path, tmp_path: Path) -> None:
    with serving(tokenizer, knows(questions)) as server:
        evaluate(server.endpoint, AccuracyTask(questions=str(questions), max_tokens=64, limit=4), tmp_path)
        evaluate(server.endpoint, AccuracyTask(questions=str(questions), max_tokens=64), tmp_path)
        assert len(server.prompts) == len(set(server.prompts)) == 9


@pytest.mark.parametrize(
    ("of_task", "of_endpoint"),
    [({"max_tokens": 65}, {}), ({"api": "chat"}, {}), ({}, {"identity": "other weights"}), ({}, {"model": "small"})],
)
def test_another_setting_or_model_is_asked_anew(
    of_task: dict[str, Any], of_endpoint: dict[str, Any], questions: Path, tokenizer: Path, tmp_path: Path
) -> None:
    task = AccuracyTask(questions=str(questions), max_tokens=64)
    with serving(tokenizer, knows(questions), names=("tiny", "small")) as server:
        evaluate(server.endpoint, task, tmp_path)
        endpoint = replace(server.endpoint, **of_endpoint)
        task = msgspec.structs.replace(task, **of_task)
        evaluate(endpoint, task, tmp_path)
        assert len(server.prompts) == 18


def test_questions_of_the_same_wording_are_each_asked_and_keep_their_own_answers(
    tokenizer: Path, tmp_path: Path
) -> None:
    folder = write_questions(tmp_path / "puzzles", {"biology": 1})
    (line,) = (folder / "test.jsonl").read_text().splitlines()
    twin = json.loads(line) | {"question_id": 99}
    (folder / "test.jsonl").write_text(f"{line}\n{json.dumps(twin)}\n")
    letters = iter("ABCD")
    task = AccuracyTask(questions=str(folder), max_tokens=64, concurrency=1)
    with serving(tokenizer, lambda _: (f"The answer is ({next(letters)}).", "stop")) as server:
        for _ in range(2):
            accuracy = evaluate(server.endpoint, task, tmp_path / "work")
            assert [a.predicted for a in accuracy.answers] == ["A", "B"]
        assert len(server.prompts) == 2
