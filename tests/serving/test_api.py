"""The HTTP contract, over a real server at TP 2."""

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch

from lightship.causal_lm import load_causal_lm

MODEL = "tiny"
PROMPT = [(5 * i) % 256 + 2 for i in range(30)]


def complete(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 8, "temperature": 0} | fields
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def events(client: httpx.Client, path: str, **fields: Any) -> list[dict[str, Any]]:
    with client.stream("POST", path, json={"model": MODEL, "temperature": 0, "stream": True} | fields) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def refused(client: httpx.Client, path: str = "/v1/completions", **fields: Any) -> tuple[int, str]:
    asked = {"prompt": "a"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "a"}]}
    response = client.post(path, json={"model": MODEL} | asked | fields)
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error["message"]


def test_a_ready_server_is_healthy_and_lists_its_model(client: httpx.Client) -> None:
    assert client.get("/health").status_code == 200
    [model] = client.get("/v1/models").json()["data"]
    assert (model["id"], model["max_model_len"]) == (MODEL, 1024)


def test_completion_counts_its_tokens_and_ends_by_length(client: httpx.Client) -> None:
    answer = complete(client)
    assert answer["object"] == "text_completion"
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": 30, "completion_tokens": 8, "total_tokens": 38}


def test_prompts_may_be_texts_or_tokens_one_or_many(client: httpx.Client) -> None:
    several = complete(client, prompt=["hello", "good day"])["choices"]
    assert [c["index"] for c in several] == [0, 1]
    assert several[0]["text"] == complete(client, prompt="hello")["choices"][0]["text"]
    tokens = complete(client, prompt=[PROMPT, PROMPT])["choices"]
    assert tokens[0]["text"] == tokens[1]["text"] == complete(client)["choices"][0]["text"]


def test_streaming_gives_the_same_text_and_the_usage(client: httpx.Client) -> None:
    whole = complete(client, max_tokens=20, logprobs=2, echo=True)
    chunks = events(
        client,
        "/v1/completions",
        prompt=PROMPT,
        max_tokens=20,
        logprobs=2,
        echo=True,
        stream_options={"include_usage": True},
    )
    *texts, usage = chunks
    assert len(texts) > 3
    assert "".join(c["choices"][0]["text"] for c in texts) == whole["choices"][0]["text"]
    streamed = [t for c in texts for t in c["choices"][0]["logprobs"]["tokens"]]
    assert streamed == whole["choices"][0]["logprobs"]["tokens"]
    assert texts[-1]["choices"][0]["finish_reason"] == "length"
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]


def test_echoed_logprobs_are_those_of_a_direct_forward(client: httpx.Client, w4afp8_dir: Path) -> None:
    """As lm-eval asks for a loglikelihood: echo, one token more, and the most likely token at each place."""
    choice = complete(client, max_tokens=1, logprobs=1, echo=True, seed=1234)["choices"][0]
    logprobs = choice["logprobs"]
    assert len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"]) == len(PROMPT) + 1
    assert logprobs["token_logprobs"][0] is None
    direct = load_causal_lm(w4afp8_dir)(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    for at in range(1, 6):
        assert logprobs["token_logprobs"][at] == pytest.approx(float(direct[at - 1, PROMPT[at]]), abs=0.05)
        assert max(logprobs["top_logprobs"][at].values()) == pytest.approx(float(direct[at - 1].max()), abs=0.05)
    assert logprobs["text_offset"][0] == 0


def test_echo_without_tokens_only_scores_the_prompt(client: httpx.Client) -> None:
    answer = complete(client, prompt="hello", max_tokens=0, echo=True, logprobs=0)
    choice = answer["choices"][0]
    assert choice["text"] == "hello"
    assert choice["logprobs"]["tokens"] == list("hello")
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3, 4]
    assert answer["usage"]["completion_tokens"] == 0


def test_a_stop_string_is_left_out(client: httpx.Client) -> None:
    plain = complete(client, max_tokens=30)["choices"][0]["text"]
    stopped = complete(client, max_tokens=30, stop=[plain[5:7]])["choices"][0]
    assert stopped["text"] == plain[: plain.index(plain[5:7])]
    assert stopped["finish_reason"] == "stop"


def test_chat_uses_the_template_whole_and_streamed(client: httpx.Client) -> None:
    messages = [{"role": "user", "content": "hi"}]
    body = {"messages": messages, "max_tokens": 8, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    answer = client.post("/v1/chat/completions", json=body).json()
    message = answer["choices"][0]["message"]
    assert message["role"] == "assistant"
    assert message["content"] == complete(client, prompt="<s>user: hi\nassistant:")["choices"][0]["text"]
    assert [len(t["top_logprobs"]) for t in answer["choices"][0]["logprobs"]["content"]] == [2] * 8
    first, *others = events(client, "/v1/chat/completions", messages=messages, max_tokens=8)
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(c["choices"][0]["delta"]["content"] for c in others) == message["content"]


def test_an_unknown_model_is_404_and_names_the_served_one(client: httpx.Client) -> None:
    status, message = refused(client, model="gpt-9")
    assert status == 404
    assert MODEL in message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "x" * 1025}, "context of 1024 tokens"),
        ({"prompt": "x" * 1000, "max_tokens": 100}, "lower max_tokens"),
        ({"n": 2}, "does not support n = 2"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"prompt": ""}, "no tokens"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [999]}, "0 to 257"),
        ({"prompt": [2**70], "echo": True}, "0 to 257"),
        ({"stop": [""]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"seed": -(2**63) - 1}, "seed"),
        ({"top_k": 5}, "top_k = 5, only -1"),
        ({"min_p": 0.1}, "min_p"),
        ({"min_tokens": 3}, "min_tokens"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"guided_regex": "a+"}, "guided_regex"),
        ({"stream_options": {"every": 1}}, "stream_options.every"),
    ],
)
def test_a_bad_request_is_400_and_says_why(client: httpx.Client, fields: dict[str, Any], message: str) -> None:
    status, said = refused(client, **fields)
    assert status == 400
    assert message in said


@pytest.mark.parametrize(
    "fields", [{"temperature": 1e-310}, {"temperature": 1e-5}, {"seed": 2**63 - 1, "temperature": 1}]
)
def test_extreme_numbers_are_served(client: httpx.Client, fields: dict[str, Any]) -> None:
    assert complete(client, **fields)["usage"]["completion_tokens"] == 8
    assert client.get("/health").status_code == 200


def test_a_refused_seed_leaves_the_server_healthy(client: httpx.Client) -> None:
    assert refused(client, seed=18446744073709551616)[0] == 400
    assert client.get("/health").status_code == 200


def test_fields_that_ask_for_nothing_are_accepted(client: httpx.Client) -> None:
    off = {"top_k": -1, "presence_penalty": 0, "repetition_penalty": 1.0, "n": 1, "best_of": 1, "logit_bias": None}
    assert complete(client, **off, min_p=0, tool_choice="none", user="me")["choices"]


@pytest.mark.parametrize("generate", [True, False])
def test_lm_evals_completion_payload_is_accepted(client: httpx.Client, generate: bool) -> None:
    lm_eval = pytest.importorskip("lm_eval.models.openai_completions")
    model = SimpleNamespace(model=MODEL, _max_gen_toks=8)
    asked = {"do_sample": False, "until": ["Q:"], "max_tokens": 4, "max_gen_toks": 4, "temperature": 0}
    create = lm_eval.LocalCompletionsAPI._create_payload
    payload = create(model, [PROMPT], generate=generate, gen_kwargs=asked, eos="</s>")
    assert client.post("/v1/completions", json=payload).status_code == 200


def test_lm_evals_chat_payload_is_accepted(client: httpx.Client) -> None:
    lm_eval = pytest.importorskip("lm_eval.models.openai_completions")
    model = SimpleNamespace(model=MODEL, _max_gen_toks=8)
    messages = [{"role": "user", "content": "hi", "type": "text"}]
    payload = lm_eval.LocalChatCompletion._create_payload(model, messages, gen_kwargs={"until": "Q:"}, eos="</s>")
    assert client.post("/v1/chat/completions", json=payload).status_code == 200


@pytest.mark.parametrize("prompt", [[0, 70, 71, 1, 72], "<s>hi"])
def test_echoed_offsets_count_special_tokens(client: httpx.Client, prompt: str | list[int]) -> None:
    choice = complete(client, prompt=prompt, max_tokens=0, echo=True, logprobs=0)["choices"][0]
    assert choice["text"].startswith("<s>")
    tokens, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
    assert [choice["text"][at:].startswith(token) for token, at in zip(tokens, offsets, strict=True)] == [True] * len(
        tokens
    )
    assert offsets[1] == 3


def test_a_bad_chat_request_is_400(client: httpx.Client) -> None:
    assert refused(client, "/v1/chat/completions", messages=[])[0] == 400
    assert refused(client, "/v1/chat/completions", messages="hi")[0] == 400
    assert refused(client, "/v1/chat/completions", echo=True) == (400, "echo: Extra inputs are not permitted")


def metric(client: httpx.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return next(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def test_metrics_count_tokens_and_name_the_engine(client: httpx.Client) -> None:
    before = metric(client, "lightship_generated_tokens_total")
    complete(client, max_tokens=7)
    assert metric(client, "lightship_generated_tokens_total") == before + 7
    text = client.get("/metrics").text
    assert 'engine="local",model="tiny",quantization="w4afp8",tp="2"' in text
    assert 'lightship_requests_total{path="/v1/completions",status="200"}' in text
    assert "lightship_time_to_first_token_seconds_bucket" in text
    assert "lightship_sequence_seconds_count" in text


def sequences_end(client: httpx.Client) -> bool:
    deadline = time.monotonic() + 5
    while metric(client, "lightship_sequences_running") and time.monotonic() < deadline:
        time.sleep(0.05)
    return metric(client, "lightship_sequences_running") == 0


LONG = {"prompt": PROMPT, "max_tokens": 900, "temperature": 0, "ignore_eos": True}


def test_a_client_that_hangs_up_cancels_its_request(client: httpx.Client) -> None:
    before = metric(client, "lightship_sequence_seconds_count")
    with pytest.raises(httpx.TimeoutException):
        client.post("/v1/completions", json=LONG, timeout=0.5)
    assert sequences_end(client)
    assert metric(client, "lightship_sequence_seconds_count") == before


def test_a_client_that_leaves_a_stream_cancels_its_request(client: httpx.Client) -> None:
    before = metric(client, "lightship_sequence_seconds_count")
    with client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as response:
        next(response.iter_lines())
    assert sequences_end(client)
    assert metric(client, "lightship_sequence_seconds_count") == before
