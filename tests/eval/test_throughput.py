"""Both servers are timed in turns under the same load, and a number that cannot be compared is refused."""

from pathlib import Path

import pytest

from lightship.endpoint import Endpoint
from lightship.errors import EvaluationError
from lightship.eval.machine import describe_machine
from lightship.eval.throughput import SERVERS, benchmark
from lightship.recipe import ThroughputLoad, TraceReplay
from lightship.summary import metrics
from tests.eval.stub_server import serving

LOAD = ThroughputLoad(concurrencies=[1, 4], requests=8, warmup_requests=2, prompt_tokens=3, output_tokens=5)
PROMPTS = [[i, i + 1, i + 2] for i in range(8)]


def test_the_faster_server_is_seen_to_be_faster_by_about_as_much(tokenizer: Path) -> None:
    with serving(tokenizer, seconds_per_token=0.02) as slow, serving(tokenizer, seconds_per_token=0.01) as fast:
        result = benchmark({"source": slow.endpoint, "quantized": fast.endpoint}, LOAD, PROMPTS)
    assert result.concurrencies == [1, 4]
    assert (result.prompt_tokens, result.output_tokens) == (3, 5)
    alone = result.load("source", 1)
    assert (alone.requests, alone.errors) == (8, 0)
    assert 20 <= alone.time_to_first_token_ms.p50 < 35
    assert 20 <= alone.time_per_output_token_ms.p50 < 30
    assert alone.output_tokens_per_second == pytest.approx(5 * alone.queries_per_minute / 60)
    assert result.load("source", 4).queries_per_minute > 2 * alone.queries_per_minute
    assert 1.4 < result.ratio(1) < 2.2


def test_the_servers_take_turns_and_warm_up_is_not_counted(tokenizer: Path) -> None:
    load = ThroughputLoad(concurrencies=[2], requests=8, warmup_requests=3, prompt_tokens=3, output_tokens=5)
    with serving(tokenizer, seconds_per_token=0.002) as one, serving(tokenizer, seconds_per_token=0.002) as other:
        result = benchmark({"source": one.endpoint, "quantized": other.endpoint}, load, PROMPTS)
    assert len(one.started) == len(other.started) == 8 + 3
    assert {x.requests for x in result.loads} == {8}
    order = [s for _, s in sorted([(t, "S") for t in one.started[3:]] + [(t, "Q") for t in other.started[3:]])]
    assert "".join(order) == "SSQQ" "QQSS" "SSQQ" "QQSS"  # fmt: skip


def test_both_servers_get_the_same_greedy_token_prompts(tokenizer: Path) -> None:
    with serving(tokenizer) as one, serving(tokenizer) as other:
        benchmark({"source": one.endpoint, "quantized": other.endpoint}, LOAD, PROMPTS)
    asked = [sorted(b["prompt"] for b in server.bodies) for server in (one, other)]
    assert asked[0] == asked[1]
    body = one.bodies[0]
    assert (body["temperature"], body["ignore_eos"], body["max_tokens"]) == (0, True, 5)


def test_requests_that_fail_are_counted_and_not_timed(tokenizer: Path) -> None:
    with serving(tokenizer) as good, serving(tokenizer, breaks=lambda n: n % 3 == 0) as flaky:
        result = benchmark({"source": good.endpoint, "quantized": flaky.endpoint}, LOAD, PROMPTS)
    flaky_load = result.load("quantized", 1)
    assert result.load("source", 1).errors == 0
    assert flaky_load.requests == 8
    assert 0 < flaky_load.errors < 8
    assert flaky_load.queries_per_minute == pytest.approx(60 * (8 - flaky_load.errors) / flaky_load.seconds)


def test_a_server_that_fails_every_request_is_named_with_its_words(tokenizer: Path) -> None:
    with serving(tokenizer) as good, serving(tokenizer, status=500) as bad:
        message = rf"quantized server {bad.endpoint.base_url} at concurrency 1 failed all 8 .*500 .*on holiday"
        with pytest.raises(EvaluationError, match=message):
            benchmark({"source": good.endpoint, "quantized": bad.endpoint}, LOAD, PROMPTS)


def test_a_server_that_is_down_is_named(tokenizer: Path) -> None:
    down = Endpoint("http://127.0.0.1:9", "tiny", tokenizer)
    with serving(tokenizer) as good, pytest.raises(EvaluationError, match=r"source server http://127\.0\.0\.1:9"):
        benchmark({"source": down, "quantized": good.endpoint}, LOAD, PROMPTS)


def test_a_server_that_stops_early_cannot_be_compared(tokenizer: Path) -> None:
    with (
        serving(tokenizer) as good,
        serving(tokenizer, tokens_short=2) as short,
        pytest.raises(EvaluationError, match="generated 3 tokens where 5 were asked for"),
    ):
        benchmark({"source": good.endpoint, "quantized": short.endpoint}, LOAD, PROMPTS)


def test_prompts_of_another_length_than_promised_are_refused(tokenizer: Path) -> None:
    endpoint = Endpoint("http://127.0.0.1:9", "tiny", tokenizer)
    with pytest.raises(EvaluationError, match=r"prompts of 3 tokens, but 2 prompts of \[3, 4\] tokens"):
        benchmark({"source": endpoint, "quantized": endpoint}, LOAD, [[1, 2, 3], [1, 2, 3, 4]])


def test_the_machine_is_described_with_its_cores() -> None:
    assert describe_machine().endswith(" cores")


def test_a_recipes_rate_and_trace_put_each_server_under_the_same_requests(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:00:00.0,9,4\n2023-11-16 18:00:00.2,700,3\n"
    )
    trace = TraceReplay(path=str(tmp_path / "t.csv"), speed=2.0)
    load = ThroughputLoad(
        concurrencies=[1], requests=8, warmup_requests=1, prompt_tokens=3, output_tokens=5, rate=40.0, trace=trace,
        ttft_ms=5000,
    )  # fmt: skip
    with serving(tokenizer) as one, serving(tokenizer) as other:
        servers = (
            Endpoint(s.endpoint.base_url, "tiny", tokenizer, context_tokens=c) for s, c in ((one, 500), (other, 600))
        )
        result = benchmark(
            dict(zip(SERVERS, servers, strict=True)), load, [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(8)]
        )
    assert [r.workload.arrivals for r in result.arrivals] == ["poisson", "trace"]
    assert [[x.server for x in r.servers] for r in result.arrivals] == [["source", "quantized"]] * 2
    assert [x["prompt"] for x in one.bodies[-2:]] == [x["prompt"] for x in other.bodies[-2:]]
    assert [len(x["prompt"]) for x in one.bodies[-2:]] == [9, 497]
    assert result.arrivals[1].workload.prompts_clipped == 1
    assert result.arrivals[1].workload.seconds == pytest.approx(0.1)
    counted = result.arrivals[0].servers[0]
    assert (counted.requests, counted.warmup_requests) == (7, 1)
    assert counted.goodput is not None
    assert metrics(result)["throughput/quantized/poisson/goodput"] == 1
