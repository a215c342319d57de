"""Requests leave when they are due whatever becomes of the others, and every way to fail has a name."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from lightship.endpoint import Endpoint
from lightship.eval.load.client import Sample, open_client
from lightship.eval.load.drive import send_in_turn, send_on_time
from lightship.eval.load.workload import Request
from tests.eval.stub_server import serving

EVERY_50_MS = [Request(0.05 * i, [1, 2, 3], 4) for i in range(10)]
LATE_MS = 60
"""What a busy machine may delay a request by; the figures are in benchmarks/trace_replay.md."""


def on_time(
    endpoint: Endpoint,
    requests: Sequence[Request],
    patience: float | None = None,
    hopeless: Callable[[Sequence[Sample], float], bool] = lambda _, __: False,
) -> list[Sample]:
    async def send() -> list[Sample]:
        async with open_client(endpoint) as client:
            return await send_on_time(client, requests, patience=patience, hopeless=hopeless)

    return asyncio.run(send())


def test_slow_answers_do_not_delay_what_is_due(tokenizer: Path) -> None:
    with serving(tokenizer, seconds_per_token=0.1) as slow:
        samples = on_time(slow.endpoint, EVERY_50_MS)
    assert len(samples) == 10
    for sample, request in zip(samples, EVERY_50_MS, strict=True):
        assert sample.due is not None
        assert samples[0].due is not None
        assert sample.due - samples[0].due == pytest.approx(request.due, abs=1e-9)
        assert 0 <= 1000 * (sample.begun - sample.due) <= LATE_MS
        assert sample.begun <= sample.written <= sample.arrivals[0]
        assert (sample.prompt_tokens, sample.generated, len(sample.arrivals)) == (3, 4, 4)
        assert sample.arrivals[0] - sample.begun >= 0.1
        assert sample.arrivals[-1] - sample.begun >= 0.4


def test_requests_that_are_due_at_once_are_in_flight_at_once(tokenizer: Path) -> None:
    burst = [Request(0.0, [1], 3)] * 16
    with serving(tokenizer, seconds_per_token=0.1) as slow:
        samples = on_time(slow.endpoint, burst)
    assert max(s.begun for s in samples) < min(s.arrivals[0] for s in samples)


def test_fixed_concurrency_is_never_exceeded_and_kept_up(tokenizer: Path) -> None:
    async def send(endpoint: Endpoint) -> list[Sample]:
        async with open_client(endpoint) as client:
            return await send_in_turn(client, [Request(0.0, [1], 3)] * 12, 3)

    with serving(tokenizer, seconds_per_token=0.02) as server:
        samples = asyncio.run(send(server.endpoint))
    flying = [sum(s.begun <= t < s.arrivals[-1] for s in samples) for t in [s.begun for s in samples]]
    assert max(flying) == 3
    assert all(s.due is None for s in samples)


def test_what_is_in_flight_after_the_patience_is_given_up(tokenizer: Path) -> None:
    started = time.perf_counter()
    with serving(tokenizer, seconds_per_token=0.5) as slow:
        samples = on_time(slow.endpoint, [Request(0.0, [1], 20)] * 2, patience=0.3)
        assert time.perf_counter() - started < 5
    assert [s.error for s in samples] == ["given up"] * 2


def test_a_hopeless_load_is_not_sent_to_its_end(tokenizer: Path) -> None:
    with serving(tokenizer, seconds_per_token=0.01) as server:
        samples = on_time(
            server.endpoint, [Request(0.1 * i, [1], 2) for i in range(100)], hopeless=lambda s, _: len(s) > 2
        )
    assert 3 <= len(samples) < 20


def test_every_failure_has_its_kind_and_the_servers_words(tokenizer: Path) -> None:
    one = EVERY_50_MS[:1]
    with serving(tokenizer, status=503) as server:
        [sample] = on_time(server.endpoint, one)
        assert (sample.error, "on holiday" in sample.said) == ("HTTP 503", True)
    with serving(tokenizer, breaks=lambda _: True) as server:
        [sample] = on_time(server.endpoint, one)
        assert (sample.error, "out of memory" in sample.said) == ("error in the stream", True)
    with serving(tokenizer, tokens_short=4) as server:
        assert [s.error for s in on_time(server.endpoint, one)] == ["empty answer"]
    assert [s.error for s in on_time(Endpoint("http://127.0.0.1:9", "tiny", tokenizer), one)] == ["cannot connect"]


def test_the_api_key_is_sent_with_each_request_and_not_shown(tokenizer: Path) -> None:
    with serving(tokenizer) as server:
        endpoint = replace(server.endpoint, api_key="s3cret")
        on_time(endpoint, EVERY_50_MS[:2])
        assert set(server.keys) == {"Bearer s3cret"}
    assert "s3cret" not in repr(endpoint)
