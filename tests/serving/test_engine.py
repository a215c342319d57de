"""The engine behind the app, in this process at TP 1."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient
from tokenizers.processors import TemplateProcessing

from lightship.causal_lm import load_tokenizer
from lightship.experts import RoutedExperts
from lightship.serving import generation
from lightship.serving.api import Served, create_app, prompt_of
from lightship.serving.engine import Engine
from lightship.serving.ranks import Ranks, Shard

BODY = {"prompt": [5, 6], "max_tokens": 3, "temperature": 1.0}


@pytest.fixture
def engine(w4afp8_dir: Path) -> Iterator[Engine]:
    threads = torch.get_num_threads()
    yield Engine(Ranks(Shard(w4afp8_dir, 1, "dynamic")), load_tokenizer(w4afp8_dir), {1})
    torch.set_num_threads(threads)


def wait_for(engine: Engine) -> None:
    deadline = time.monotonic() + 60
    while not engine.ready and not engine.failure and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.ready


def test_a_ready_engine_has_expanded_its_experts(engine: Engine) -> None:
    expanded: list[bool] = []

    def look() -> None:
        experts = [m for m in engine.ranks.model.model.modules() if isinstance(m, RoutedExperts)]
        expanded.extend(layer._expanded is not None for layer in experts)

    engine._on_ready = look
    engine.start()
    wait_for(engine)
    engine.stop()
    assert expanded
    assert all(expanded)


def test_a_failing_sequence_gets_500_and_the_server_lives(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise RuntimeError("the dice are lost")

    served = Served("tiny", engine.tokenizer, 1024, 258)
    with TestClient(create_app(engine, served)) as client:
        wait_for(engine)
        with monkeypatch.context() as patched:
            patched.setattr(generation, "draw", fail)
            failed = client.post("/v1/completions", json=BODY)
            streamed = client.post("/v1/completions", json=BODY | {"stream": True})
        assert failed.status_code == 500
        assert "the dice are lost" in failed.json()["error"]["message"]
        assert '"code":500' in streamed.text
        assert client.get("/health").status_code == 200
        assert client.post("/v1/completions", json=BODY).status_code == 200


def test_a_token_that_the_tokenizer_adds_has_no_part_in_the_echo(w4afp8_dir: Path) -> None:
    tokenizer = load_tokenizer(w4afp8_dir)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    prompt = prompt_of("<s>ab", tokenizer)
    assert (prompt.tokens[:2], prompt.text, prompt.unwritten) == ([0, 0], "<s>ab", 1)
    assert prompt_of("", tokenizer).unwritten == 1
