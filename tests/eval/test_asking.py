"""Requests reach any OpenAI-compatible server, failures that pass are passed over, and those that last are named."""

from pathlib import Path
from typing import Any

import pytest

from lightship.endpoint import Endpoint, read_api_key
from lightship.errors import EvaluationError, ServingError
from lightship.eval.accuracy import evaluate
from lightship.recipe import AccuracyTask
from tests.eval.stub_server import serving
from tests.eval.test_accuracy import knows

SECRET = "sk-lightship-4711"


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightship.eval.sending.PAUSE_SECONDS", 0.001)


def task(questions: Path, **settings: Any) -> AccuracyTask:
    return AccuracyTask(questions=str(questions), **{"max_tokens": 64, "concurrency": 4} | settings)


@pytest.mark.parametrize("failure", [500, 503, 429, 0])
def test_a_request_that_fails_for_a_while_is_asked_again(
    failure: int, questions: Path, tokenizer: Path, tmp_path: Path
) -> None:
    with serving(tokenizer, knows(questions), fails=lambda n: failure if n < 5 else None) as server:
        accuracy = evaluate(server.endpoint, task(questions), tmp_path)
    assert (accuracy.accuracy, len(server.prompts)) == (1.0, 9)


@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize(
    ("failure", "said"),
    [(500, "status 500.*the experts are on holiday"), (0, "disconnected"), (200, "an answer without choices.*holiday")],
)
def test_a_server_that_goes_on_failing_is_named_and_nothing_answered_is_lost(
    failure: int, said: str, concurrency: int, questions: Path, tokenizer: Path, tmp_path: Path
) -> None:
    with serving(tokenizer, knows(questions), fails=lambda n: failure if n > 5 else None) as server:
        with pytest.raises(EvaluationError, match=rf"{server.endpoint.base_url}.* failed 5 times .*{said}.*answers"):
            evaluate(server.endpoint, task(questions, concurrency=concurrency), tmp_path)
        answered = (tmp_path / "answers.jsonl").read_bytes().count(b"\n")
    assert answered == 5
    assert len(server.bodies) > 5 + 4
    with serving(tokenizer, knows(questions)) as server:
        accuracy = evaluate(server.endpoint, task(questions), tmp_path)
    assert (accuracy.accuracy, len(server.prompts)) == (1.0, 9 - answered)


@pytest.mark.parametrize("status", [400, 404])
def test_a_refusal_is_not_asked_again(status: int, questions: Path, tokenizer: Path, tmp_path: Path) -> None:
    with serving(tokenizer, status=status) as server:
        with pytest.raises(EvaluationError, match=rf"refuses the request with status {status}, .*on holiday"):
            evaluate(server.endpoint, task(questions, concurrency=1), tmp_path)
        assert len(server.bodies) == 1


def test_chat_sends_the_worked_examples_as_turns_and_needs_no_tokenizer(
    questions: Path, tokenizer: Path, tmp_path: Path
) -> None:
    with serving(tokenizer, knows(questions)) as server:
        endpoint = Endpoint(server.endpoint.base_url, "tiny", tmp_path / "none")
        accuracy = evaluate(endpoint, task(questions, api="chat"), tmp_path)
    roles = [message["role"] for message in server.bodies[0]["messages"]]
    assert roles == ["system", *["user", "assistant"] * 5, "user"]
    assert (accuracy.accuracy, accuracy.overrides["api"]) == (1.0, "chat, worked examples as turns")
    assert (server.bodies[0]["stop"], server.bodies[0]["temperature"]) == (["Question:"], 0.0)


def test_reasoning_is_asked_without_stop_texts_and_stripped_before_the_filter(
    questions: Path, tokenizer: Path, tmp_path: Path
) -> None:
    true = knows(questions)
    thinks = lambda prompt: ("<think>The answer is (J). Question: no</think>" + true(prompt)[0], "stop")  # noqa: E731
    with serving(tokenizer, thinks) as server:
        accuracy = evaluate(server.endpoint, task(questions, reasoning=True, max_tokens=512), tmp_path)
    assert {"stop"} & server.bodies[0].keys() == set()
    assert (accuracy.accuracy, accuracy.truncated, accuracy.unparsed) == (1.0, 0.0, 0.0)
    assert not any("think" in a.text or "(J)" in a.text for a in accuracy.answers)
    assert accuracy.overrides["thinking"] == "stripped, stop texts applied after it"
    assert accuracy.overrides["max_gen_toks"] == "512"
    assert "(J). Question: no" in (tmp_path / "answers.jsonl").read_text()


def test_thinking_that_never_ends_counts_as_truncated_and_unparsed(
    questions: Path, tokenizer: Path, tmp_path: Path
) -> None:
    with serving(tokenizer, lambda _: ("<think>The answer is (B), or", "length")) as server:
        accuracy = evaluate(server.endpoint, task(questions, reasoning=True), tmp_path)
    assert (accuracy.truncated, accuracy.unparsed, accuracy.accuracy) == (1.0, 1.0, 0.0)


def test_the_servers_reasoning_content_never_reaches_the_filter(
    questions: Path, tokenizer: Path, tmp_path: Path
) -> None:
    thinking = {"reasoning_content": "The answer is (J)."}
    with serving(tokenizer, knows(questions), message=thinking) as server:
        accuracy = evaluate(server.endpoint, task(questions, api="chat", reasoning=True), tmp_path / "a")
    with serving(tokenizer, message=thinking | {"content": None}) as server:
        mute = evaluate(server.endpoint, task(questions, api="chat", reasoning=True), tmp_path / "b")
    assert (accuracy.accuracy, accuracy.truncated) == (1.0, 0.0)
    assert (mute.unparsed, mute.truncated) == (1.0, 1.0)


def test_the_key_is_sent_with_every_request_and_kept_nowhere(
    questions: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-somebody-else")
    with serving(tokenizer, knows(questions), key=SECRET) as server:
        endpoint = Endpoint.connect(server.endpoint.base_url, tokenizer, SECRET)
        evaluate(endpoint, task(questions), tmp_path)
        assert set(server.keys) == {f"Bearer {SECRET}"}
    assert SECRET not in repr(endpoint)
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]


def test_without_a_key_of_ours_none_is_sent(
    questions: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-somebody-else")
    with serving(tokenizer) as server:
        evaluate(server.endpoint, task(questions), tmp_path)
        assert set(server.keys) == {None}


def test_a_refused_key_is_not_repeated_though_the_server_does(questions: Path, tokenizer: Path, tmp_path: Path) -> None:
    with serving(tokenizer, key="another") as server:
        endpoint = Endpoint(server.endpoint.base_url, "tiny", tokenizer, api_key=SECRET)
        with pytest.raises(EvaluationError, match=r"status 401.*<the API key> is not a key.*--api-key-file") as caught:
            evaluate(endpoint, task(questions), tmp_path)
    assert SECRET not in str(caught.value)


def test_a_key_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIGHTSHIP_API_KEY", raising=False)
    assert read_api_key(None) is None
    monkeypatch.setenv("LIGHTSHIP_API_KEY", "of-the-environment")
    (tmp_path / "key").write_text(f"{SECRET}\n")
    assert (read_api_key(None), read_api_key(tmp_path / "key")) == ("of-the-environment", SECRET)
    (tmp_path / "key").write_text("key = value")
    with pytest.raises(ServingError, match="holds no key"):
        read_api_key(tmp_path / "key")
