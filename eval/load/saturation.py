"""Where a server's knee is: load after load until goodput or throughput stops growing. Several servers take turns.

    sweep(servers, text, SweepSettings(unit="requests a second", slo=Slo(ttft_ms=500, tpot_ms=50)))

With limits, a load is sustained if at least `share` of its requests keep them. Without, a rate is sustained if answers
end at nine tenths of it; and a number in flight, if throughput has grown by at least the square root of what it has
grown by: twice as many must bring 41 % more answers.

Every load has prompts of its own, the same for each server: a prefix cache that kept those of an earlier step would
answer a later one from memory.
"""

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from lightship.endpoint import Endpoint
from lightship.errors import EvaluationError
from lightship.eval.load.client import REQUEST_SECONDS, Client, Sample, open_client
from lightship.eval.load.drive import send_in_turn, send_on_time
from lightship.eval.load.figures import figures_of, is_good, warmup_of
from lightship.eval.load.prompts import PromptText
from lightship.eval.load.search import Search
from lightship.eval.load.workload import LoadPlan, at_concurrency, at_rate
from lightship.eval.machine import describe_machine
from lightship.records import Figures, Saturation, Slo, Step, SweepReport

Unit = Literal["requests a second", "requests in flight"]
KEPT_UP = 0.9
"""Without limits: the share of a rate that must be answered as fast as it comes."""
GROWTH = 0.5
"""Without limits: throughput must grow by at least the growth in flight to this power."""
LEAST_REQUESTS = 20
"""Of a step: fewer say little about a share."""
PROMPTS_APART = 16_777_213
"""Between the first prompts of two loads: more than a step sends, and a prime, so that the numbers differ from their
first digit on, whatever their base."""


@dataclass(frozen=True)
class SweepSettings:
    """What is swept, and when a load counts as sustained."""

    unit: Unit
    slo: Slo | None = None
    share: float = 0.9
    seconds: float = 20.0
    """A step's arrivals last about this long."""
    warmup_seconds: float = 2.0
    """Of a rate: what is due before is not counted. In flight, the first request of each is not."""
    prompt_tokens: int = 256
    output_tokens: int = 32
    start: float = 1.0
    most: float = math.inf
    seed: int = 0
    rest_seconds: float = 1.0
    """Between steps; a server takes a moment to drop what was given up."""

    @property
    def criterion(self) -> str:
        """For people: when a load is sustained."""
        if self.slo is None and self.unit == "requests a second":
            return f"{KEPT_UP:.0%} of the rate is answered as fast as it comes"
        if self.slo is None:
            return f"throughput grows by at least the growth in flight to the power of {GROWTH:g}"
        limits = [f"TTFT at most {self.slo.ttft_ms:g} ms"] if self.slo.ttft_ms is not None else []
        limits += [f"TPOT at most {self.slo.tpot_ms:g} ms"] if self.slo.tpot_ms is not None else []
        return f"{self.share:.0%} of the requests with {' and '.join(limits)}"


@dataclass
class Sweep:
    """One server's search and steps so far."""

    server: str
    client: Client
    search: Search
    steps: list[Step] = field(default_factory=list)

    def result(self) -> Saturation:
        """The knee; its `highest` is 0 if no load at all was sustained."""
        refused = None if math.isinf(self.search.refused) else self.search.refused
        return Saturation(server=self.server, highest=self.search.highest, refused=refused, steps=self.steps)


def sweep(servers: Mapping[str, Endpoint], text: PromptText, settings: SweepSettings) -> SweepReport:
    """Find the knee of each server, a step of one after a step of another, so that a slow minute slows both.

    Raises:
        EvaluationError: no server sustained any load.
    """
    found = asyncio.run(_sweep(servers, text, settings))
    if not any(sweep.search.highest for sweep in found):
        last = found[-1].steps[-1]
        raise EvaluationError(
            f"the server {found[-1].server} sustained no load, not even {last.load:g}: {last.why}; loosen the limits "
            "or shorten the requests"
        )
    return SweepReport(
        unit=settings.unit,
        criterion=settings.criterion,
        prompt_tokens=settings.prompt_tokens,
        output_tokens=settings.output_tokens,
        servers=[sweep.result() for sweep in found],
        machine=describe_machine(),
        date=datetime.now(UTC).date().isoformat(),
    )


async def _sweep(servers: Mapping[str, Endpoint], text: PromptText, settings: SweepSettings) -> list[Sweep]:
    from contextlib import AsyncExitStack

    whole = settings.unit == "requests in flight"
    firsts: dict[float, int] = {}
    async with AsyncExitStack() as stack:
        sweeps = []
        for name, endpoint in servers.items():
            client = await stack.enter_async_context(open_client(endpoint))
            sweeps.append(Sweep(name, client, Search(settings.start, settings.most, whole)))
        while any([await _step(x, text, settings, firsts) for x in sweeps]):
            pass
    return sweeps


async def _step(sweep: Sweep, text: PromptText, settings: SweepSettings, firsts: dict[float, int]) -> bool:
    """Run the search's next load; whether there was one. `firsts` has the first prompt's number of each load so far."""
    load = sweep.search.next_load()
    if load is None:
        return False
    first = firsts.setdefault(load, len(firsts) * PROMPTS_APART)
    samples = await _send(sweep.client, plan_step(load, text, settings, first), load, settings)
    warmup = _warmup(samples, load, settings)
    figures = None
    if any(s.error is None for s in samples[warmup:]):
        figures = figures_of(samples, sweep.server, settings.slo, warmup)
    best = max((s for s in sweep.steps if s.sustained), key=lambda s: s.load, default=None)
    sustained, why = judge(load, figures, samples[warmup:], best, settings)
    sweep.steps.append(Step(load=load, sustained=sustained, why=why, figures=figures))
    sweep.search.note(load, sustained)
    await asyncio.sleep(settings.rest_seconds)
    return True


def plan_step(load: float, text: PromptText, settings: SweepSettings, first: int = 0) -> LoadPlan:
    """The requests of one step, warm-up included; without it, at least twenty, and at fixed concurrency four times what
    is in flight.

    Args:
        first: number of the first prompt.
    """
    lengths = settings.prompt_tokens, settings.output_tokens
    if settings.unit == "requests in flight":
        requests = int(load) + max(LEAST_REQUESTS, 4 * int(load))
        return at_concurrency(int(load), text, requests, *lengths, first=first)
    requests = max(LEAST_REQUESTS, math.ceil(load * settings.seconds)) + math.ceil(load * settings.warmup_seconds)
    if requests >= PROMPTS_APART:
        raise EvaluationError(
            f"{load:g} requests a second are {requests} in a step, more than {PROMPTS_APART}; lower it"
        )
    return at_rate(load, text, requests, *lengths, settings.seed, first=first)


def _warmup(samples: Sequence[Sample], load: float, settings: SweepSettings) -> int:
    """How many of a step's first samples are not counted."""
    if settings.unit == "requests in flight":
        return int(load)
    return warmup_of(samples, 0, settings.warmup_seconds)


async def _send(client: Client, plan: LoadPlan, load: float, settings: SweepSettings) -> list[Sample]:
    if settings.unit == "requests in flight":
        return await send_in_turn(client, plan.requests, int(load))
    return await send_on_time(
        client,
        plan.requests,
        patience=patience_of(settings),
        hopeless=lambda samples, now: is_hopeless(samples, now, len(plan.requests), settings),
    )


def patience_of(settings: SweepSettings) -> float:
    """Seconds after which what is still in flight has certainly missed the limits; without both, an answer may take as
    long as the client waits at all."""
    if settings.slo is None or settings.slo.ttft_ms is None or settings.slo.tpot_ms is None:
        return REQUEST_SECONDS
    return (settings.slo.ttft_ms + settings.slo.tpot_ms * settings.output_tokens) / 1000 + 1


def is_hopeless(samples: Sequence[Sample], now: float, planned: int, settings: SweepSettings) -> bool:
    """Whether nothing that is still to come can make the load a sustained one: the share is missed, or, without limits,
    answers have taken too long for the rate."""
    if not samples or samples[0].due is None or now < samples[0].due + settings.warmup_seconds:
        return False
    warmup = warmup_of(samples, 0, settings.warmup_seconds)
    counted = samples[warmup:]
    if settings.slo is None:
        ends, dues = _ends(counted), [s.due for s in counted if s.due is not None]
        return len(samples) == planned and bool(ends) and now > min(ends) + (dues[-1] - dues[0]) / KEPT_UP
    missed = sum(not is_good(s, settings.slo) if s.done else _is_late(s, now, settings.slo) for s in counted if s.begun)
    return planned - warmup - missed < settings.share * (planned - warmup)


def _is_late(sample: Sample, now: float, slo: Slo) -> bool:
    """Whether a request in flight has missed a limit already."""
    first = sample.arrivals[0] if sample.arrivals else now
    late = slo.ttft_ms is not None and 1000 * (first - sample.begun) > slo.ttft_ms
    return late or (slo.tpot_ms is not None and 1000 * (now - first) > slo.tpot_ms * (sample.asked - 1))


def _ends(samples: Sequence[Sample]) -> list[float]:
    """When those that are answered ended."""
    return [s.arrivals[-1] for s in samples if s.done and s.error is None]


def judge(
    load: float, figures: Figures | None, samples: Sequence[Sample], best: Step | None, settings: SweepSettings
) -> tuple[bool, str]:
    """Whether a load was sustained, and why.

    Args:
        figures: None if nothing was answered.
        best: the largest sustained load before it.
    """
    if figures is None:
        return False, f"none of {len(samples)} requests was answered"
    if settings.slo is not None:
        share = sum(is_good(s, settings.slo) for s in samples) / len(samples)
        return share >= settings.share, f"{share:.1%} of {len(samples)} requests within the limits"
    answered = figures.queries_per_minute / 60
    if settings.unit == "requests a second":
        ends, dues = _ends(samples), [s.due for s in samples if s.due is not None]
        span = dues[-1] - dues[0]
        offered = (len(dues) - 1) / span
        # From end to end as from due to due, so that long answers are not slow ones. A server that stops answering ends
        # early: its answers count over the time in which they were wanted.
        answered = (len(ends) - 1) / max(max(ends) - min(ends), span)
        return answered >= KEPT_UP * offered, f"{answered:.3g} answers a second of {offered:.3g} requests"
    if best is None or best.figures is None:
        return True, f"{answered:.3g} answers a second"
    grown = figures.queries_per_minute / best.figures.queries_per_minute
    wanted = (load / best.load) ** GROWTH
    return grown >= wanted, f"{grown:.2f}x the answers a second for {load / best.load:.2f}x in flight"
