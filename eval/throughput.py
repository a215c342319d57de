"""How fast the source and the quantized server answer, measured in turns in one run.

    lightship bench OUT --against demo/checkpoint --recipe recipes/demo.toml

Both servers get the same prompts in alternating rounds, so that whatever slows the machine meanwhile slows both. A
round keeps `concurrency` requests in flight. Every request generates exactly `output_tokens` tokens, greedily.
Why no load tool is used: docs/decisions.md.
"""

import asyncio
import itertools
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightship.endpoint import Endpoint
from lightship.errors import EvaluationError
from lightship.progress import tracked
from lightship.recipe import ThroughputLoad
from lightship.records import Load, Percentiles, Throughput

if TYPE_CHECKING:
    import httpx

Server = Literal["source", "quantized"]
Prompt = list[int]
SERVERS: tuple[Server, Server] = ("source", "quantized")
ROUNDS = 4
REQUEST_SECONDS = 600


@dataclass(frozen=True)
class Answer:
    """One request that succeeded: seconds to the first and to the last token, and the tokens the server counted."""

    first: float
    last: float
    tokens: int


@dataclass
class Tally:
    """What one server did at one concurrency."""

    answers: list[Answer] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    seconds: float = 0.0


def benchmark(servers: Mapping[Server, Endpoint], load: ThroughputLoad, prompts: Sequence[Prompt]) -> Throughput:
    """Time both servers at every concurrency of `load`.

    Args:
        servers: `source` and `quantized`.
        prompts: token ids, `load.prompt_tokens` each; used in order and, if there are fewer than requests, again.

    Raises:
        EvaluationError: the prompts are not as long as the load says, every request to a server failed, or a server
        generated another number
            of tokens than it was asked for.
    """
    _check(load, prompts)
    loads = asyncio.run(_measure(servers, load, prompts))
    return Throughput(
        prompt_tokens=load.prompt_tokens, output_tokens=load.output_tokens, loads=loads, machine=describe_machine()
    )


def describe_machine() -> str:
    """This machine's GPUs, if any, processor and usable cores: `Intel(R) Xeon(R) …, 8 cores`."""
    gpus = [
        line.partition(":")[2].strip()
        for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
        for line in path.read_text().splitlines()
        if line.startswith("Model:")
    ]
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = next((line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")), "CPU")
    return ", ".join([*(f"{gpus.count(g)}× {g}" for g in sorted(set(gpus))), processor, f"{os.cpu_count()} cores"])


def _check(load: ThroughputLoad, prompts: Sequence[Prompt]) -> None:
    if not prompts or any(len(p) != load.prompt_tokens for p in prompts):
        raise EvaluationError(
            f"the recipe promises prompts of {load.prompt_tokens} tokens, but {len(prompts)} prompts of "
            f"{sorted({len(p) for p in prompts})} tokens were given"
        )


async def _measure(servers: Mapping[Server, Endpoint], load: ThroughputLoad, prompts: Sequence[Prompt]) -> list[Load]:
    import httpx

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    loads = []
    async with httpx.AsyncClient(timeout=REQUEST_SECONDS, limits=limits, trust_env=False) as client:
        for concurrency in tracked(load.concurrencies, "timing both servers"):
            tallies = {server: Tally() for server in SERVERS}
            for server in SERVERS:
                warm_up = [prompts[i % len(prompts)] for i in range(load.warmup_requests)]
                await _round(client, servers[server], warm_up, concurrency, load.output_tokens, Tally())
            for number, requests in enumerate(_rounds(load.requests, concurrency)):
                batch = [prompts[i % len(prompts)] for i in requests]
                for server in SERVERS if number % 2 == 0 else SERVERS[::-1]:
                    await _round(client, servers[server], batch, concurrency, load.output_tokens, tallies[server])
            loads += [_summary(s, servers[s], tallies[s], concurrency, load.output_tokens) for s in SERVERS]
    return loads


def _rounds(requests: int, concurrency: int) -> Iterator[range]:
    """Split the requests into up to four rounds that all fill the concurrency."""
    rounds = min(ROUNDS, requests // concurrency)
    edges = [requests * i // rounds for i in range(rounds + 1)]
    return (range(a, b) for a, b in itertools.pairwise(edges))


async def _round(
    client: "httpx.AsyncClient",
    endpoint: Endpoint,
    prompts: Sequence[Prompt],
    concurrency: int,
    tokens: int,
    tally: Tally,
) -> None:
    """Answer all prompts with `concurrency` requests in flight, and add to the tally."""
    import httpx

    waiting = iter(prompts)

    async def worker() -> None:
        for prompt in waiting:
            try:
                tally.answers.append(await _ask(client, endpoint, prompt, tokens))
            except httpx.HTTPError as error:
                tally.errors.append(str(error) or type(error).__name__)

    started = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(concurrency)))
    tally.seconds += time.perf_counter() - started


async def _ask(client: "httpx.AsyncClient", endpoint: Endpoint, prompt: Prompt, tokens: int) -> Answer:
    import httpx

    body = {
        "model": endpoint.model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    first = last = 0.0
    generated = 0
    started = time.perf_counter()
    async with client.stream("POST", f"{endpoint.base_url.rstrip('/')}/v1/completions", json=body) as response:
        if response.is_error:
            said = (await response.aread()).decode(errors="replace")
            raise httpx.HTTPStatusError(f"{response.status_code} {said}", request=response.request, response=response)
        async for line in response.aiter_lines():
            now = time.perf_counter() - started
            event = _event(line)
            if event.get("choices"):
                first, last = first or now, now
            if event.get("usage"):
                generated = event["usage"]["completion_tokens"]
    return Answer(first, last, generated)


def _event(line: str) -> dict[str, Any]:
    """A server-sent event's JSON, {} for what carries none. A failure in mid-stream is an event too."""
    import httpx

    if not line.startswith("data:") or line.endswith("[DONE]"):
        return {}
    event: dict[str, Any] = json.loads(line.removeprefix("data:"))
    if "error" in event:
        raise httpx.RemoteProtocolError(str(event["error"]))
    return event


def _summary(server: Server, endpoint: Endpoint, tally: Tally, concurrency: int, tokens: int) -> Load:
    where = f"the {server} server {endpoint.base_url} at concurrency {concurrency}"
    if not tally.answers:
        raise EvaluationError(f"{where} failed all {len(tally.errors)} requests, the last with: {tally.errors[-1]}")
    for answer in tally.answers:
        if answer.tokens != tokens:
            raise EvaluationError(
                f"{where} generated {answer.tokens} tokens where {tokens} were asked for, so its speed cannot be "
                "compared; "
                "it must honour ignore_eos and stream_options.include_usage"
            )
    return Load(
        server=server,
        concurrency=concurrency,
        requests=len(tally.answers) + len(tally.errors),
        errors=len(tally.errors),
        seconds=tally.seconds,
        queries_per_minute=60 * len(tally.answers) / tally.seconds,
        output_tokens_per_second=sum(a.tokens for a in tally.answers) / tally.seconds,
        time_to_first_token_ms=_percentiles([1000 * a.first for a in tally.answers]),
        time_per_output_token_ms=_percentiles([1000 * (a.last - a.first) / (a.tokens - 1) for a in tally.answers]),
    )


def _percentiles(values: Sequence[float]) -> Percentiles:
    import numpy as np

    p50, p90, p99 = np.percentile(values, [50, 90, 99]).tolist()
    return Percentiles(p50=p50, p90=p90, p99=p99)
