"""How fast the source and the quantized server answer, measured in turns in one run.

    lightship bench OUT --against demo/checkpoint --recipe recipes/demo.toml

Both servers get the same prompts in alternating rounds, so that whatever slows the machine meanwhile slows both. A
round keeps `concurrency` requests in flight. Every request generates exactly `output_tokens` tokens, greedily. If the
recipe names a rate or a trace, each server is then put under it, one after the other.
Why no load tool is used: docs/decisions.md.
"""

import asyncio
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lightship.endpoint import Endpoint
from lightship.errors import EvaluationError
from lightship.eval.load.client import Client, Sample, open_client
from lightship.eval.load.drive import send_in_turn
from lightship.eval.load.figures import figures_of_time, seconds_of
from lightship.eval.load.measure import measure
from lightship.eval.load.prompts import PromptText
from lightship.eval.load.traces import cut, read_trace
from lightship.eval.load.workload import LoadPlan, Request, at_rate, from_trace
from lightship.eval.machine import describe_machine
from lightship.files import digest_of_file
from lightship.progress import tracked
from lightship.recipe import ThroughputLoad, TraceReplay
from lightship.records import Load, LoadReport, Slo, Throughput

Server = Literal["source", "quantized"]
Prompt = list[int]
SERVERS: tuple[Server, Server] = ("source", "quantized")
ROUNDS = 4


@dataclass
class Tally:
    """What one server did at one concurrency."""

    samples: list[Sample] = field(default_factory=list)
    seconds: float = 0.0


def benchmark(servers: Mapping[Server, Endpoint], load: ThroughputLoad, prompts: Sequence[Prompt]) -> Throughput:
    """Time both servers at every concurrency of `load`, and under its rate and its trace.

    Args:
        servers: `source` and `quantized`.
        prompts: token ids, `load.prompt_tokens` each; used in order and, if there are fewer than requests, again.

    Raises:
        EvaluationError: the prompts are not as long as the load says, the trace cannot be read, every request to a
            server failed, or a server generated another number of tokens than it was asked for.
    """
    _check(load, prompts)
    loads = asyncio.run(_measure(servers, load, prompts))
    return Throughput(
        prompt_tokens=load.prompt_tokens,
        output_tokens=load.output_tokens,
        loads=loads,
        machine=describe_machine(),
        arrivals=_arrivals(servers, load, prompts),
    )


def _check(load: ThroughputLoad, prompts: Sequence[Prompt]) -> None:
    if not prompts or any(len(p) != load.prompt_tokens for p in prompts):
        raise EvaluationError(
            f"the recipe promises prompts of {load.prompt_tokens} tokens, but {len(prompts)} prompts of "
            f"{sorted({len(p) for p in prompts})} tokens were given"
        )


def _arrivals(servers: Mapping[Server, Endpoint], load: ThroughputLoad, prompts: Sequence[Prompt]) -> list[LoadReport]:
    """A report for the recipe's rate and one for its trace, if it names them."""
    if load.rate is None and load.trace is None:
        return []
    text = PromptText([token for prompt in prompts for token in prompt])
    slo = Slo(ttft_ms=load.ttft_ms, tpot_ms=load.tpot_ms) if load.ttft_ms or load.tpot_ms else None
    plans = []
    if load.rate is not None:
        plans.append(at_rate(load.rate, text, load.requests, load.prompt_tokens, load.output_tokens))
    if load.trace is not None:
        plans.append(_replay(load.trace, text, min(x.context_tokens or load.trace.window for x in servers.values())))
    named = {str(name): servers[name] for name in SERVERS}
    return [measure(named, plan, slo, warmup_requests=load.warmup_requests) for plan in plans]


def _replay(trace: TraceReplay, text: PromptText, context: int) -> LoadPlan:
    path = Path(trace.path)
    arrivals = cut(read_trace(path), trace.speed, trace.seconds, trace.requests)
    window = min(trace.window, context)
    name = f"{path.name} at speed {trace.speed:g}"
    return from_trace(arrivals, text, window, trace.fit, name, digest=digest_of_file(path))


async def _measure(servers: Mapping[Server, Endpoint], load: ThroughputLoad, prompts: Sequence[Prompt]) -> list[Load]:
    loads = []
    async with open_client(servers["source"]) as source, open_client(servers["quantized"]) as quantized:
        clients: dict[Server, Client] = {"source": source, "quantized": quantized}
        for concurrency in tracked(load.concurrencies, "timing both servers"):
            tallies = {server: Tally() for server in SERVERS}
            for server in SERVERS:
                warm_up = _requests(range(load.warmup_requests), prompts, load.output_tokens)
                await send_in_turn(clients[server], warm_up, concurrency)
            for number, numbers in enumerate(_rounds(load.requests, concurrency)):
                requests = _requests(numbers, prompts, load.output_tokens)
                for server in SERVERS if number % 2 == 0 else SERVERS[::-1]:
                    samples = await send_in_turn(clients[server], requests, concurrency)
                    tallies[server].samples += samples
                    tallies[server].seconds += seconds_of(samples)
            loads += [_summary(s, servers[s], tallies[s], concurrency, load.output_tokens) for s in SERVERS]
    return loads


def _requests(numbers: range, prompts: Sequence[Prompt], output_tokens: int) -> list[Request]:
    return [Request(0.0, prompts[i % len(prompts)], output_tokens) for i in numbers]


def _rounds(requests: int, concurrency: int) -> Iterator[range]:
    """Split the requests into up to four rounds that all fill the concurrency."""
    rounds = min(ROUNDS, requests // concurrency)
    edges = [requests * i // rounds for i in range(rounds + 1)]
    return (range(a, b) for a, b in itertools.pairwise(edges))


def _summary(server: Server, endpoint: Endpoint, tally: Tally, concurrency: int, tokens: int) -> Load:
    where = f"the {server} server {endpoint.base_url} at concurrency {concurrency}"
    fields = figures_of_time(tally.samples, tally.seconds, where)
    for sample in tally.samples:
        if sample.error is None and sample.generated != tokens:
            raise EvaluationError(
                f"{where} generated {sample.generated} tokens where {tokens} were asked for, so its speed cannot be "
                "compared; it must honour ignore_eos and stream_options.include_usage"
            )
    return Load(server=server, concurrency=concurrency, **fields)
