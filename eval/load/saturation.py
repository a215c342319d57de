"""Where a server's knee is: load after load until goodput or throughput stops growing. Several servers take turns.

    sweep(servers, text, SweepSettings(unit="requests a second", slo=Slo(ttft_ms=500, tpot_ms=50)))

With limits, a load is sustained if at least `share` of its requests keep them. Without, a rate is sustained if nine
tenths of it are answered; and a number in flight, if throughput has grown by at least the square root of what it has
grown by: twice as many must bring 41 % more answers.
"""

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from lightship.endpoint import Endpoint
from lightship.errors import EvaluationError
from lightship.eval.load.client import Client, Sample, open_client
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


@dataclass(frozen=True)
class SweepSettings:
    """What is swept, and when a load counts as sustained."""

    unit: Unit
    slo: Slo | None = None
    share: float = 0.9
    seconds: float = 20.0
    """A step's arrivals last about this long."""
    warmup_seconds: float = 2.0
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
        """The knee.

        Raises:
            EvaluationError: no load at all was sustained.
        """
        if not self.search.highest:
            last = self.steps[-1]
            raise EvaluationError(
                f"the server {self.server} sustained no load, not even {last.load:g}: {last.why}; loosen the limits or "
                "shorten the requests"
            )
        refused = None if math.isinf(self.search.refused) else self.search.refused
        return Saturation(server=self.server, highest=self.search.highest, refused=refused, steps=self.steps)


def sweep(servers: Mapping[str, Endpoint], text: PromptText, settings: SweepSettings) -> SweepReport:
    """Find the knee of each server, a step of one after a step of another, so that a slow minute slows both.

    Raises:
        EvaluationError: a server sustained no load at all.
    """
    found = asyncio.run(_sweep(servers, text, settings))
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
    async with AsyncExitStack() as stack:
        sweeps = []
        for name, endpoint in servers.items():
            client = await stack.enter_async_context(open_client(endpoint))
            sweeps.append(Sweep(name, client, Search(settings.start, settings.most, whole)))
        while any([await _step(x, text, settings) for x in sweeps]):
            pass
    return sweeps


async def _step(sweep: Sweep, text: PromptText, settings: SweepSettings) -> bool:
    """Run the search's next load; whether there was one."""
    load = sweep.search.next_load()
    if load is None:
        return False
    samples = await _send(sweep.client, plan_step(load, text, settings), load, settings)
    warmup = warmup_of(samples, 0, settings.warmup_seconds)
    figures = None
    if any(s.error is None for s in samples[warmup:]):
        figures = figures_of(samples, sweep.server, settings.slo, warmup)
    best = max((s for s in sweep.steps if s.sustained), key=lambda s: s.load, default=None)
    sustained, why = judge(load, figures, samples[warmup:], best, settings)
    sweep.steps.append(Step(load=load, sustained=sustained, why=why, figures=figures))
    sweep.search.note(load, sustained)
    await asyncio.sleep(settings.rest_seconds)
    return True


def plan_step(load: float, text: PromptText, settings: SweepSettings) -> LoadPlan:
    """The requests of one step; at least twenty, and at fixed concurrency four times what is in flight."""
    lengths = settings.prompt_tokens, settings.output_tokens
    if settings.unit == "requests in flight":
        return at_concurrency(int(load), text, max(LEAST_REQUESTS, 4 * int(load)), *lengths)
    seconds = settings.seconds + settings.warmup_seconds
    return at_rate(load, text, max(LEAST_REQUESTS, math.ceil(load * seconds)), *lengths, settings.seed)


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
    """Seconds after which what is still in flight has certainly missed the limits, or has piled up without them."""
    if settings.slo is None or settings.slo.ttft_ms is None or settings.slo.tpot_ms is None:
        return settings.seconds
    return (settings.slo.ttft_ms + settings.slo.tpot_ms * settings.output_tokens) / 1000 + 1


def is_hopeless(samples: Sequence[Sample], now: float, planned: int, settings: SweepSettings) -> bool:
    """Whether the share is missed whatever happens to the requests that are still to come."""
    if settings.slo is None or not samples or samples[0].due is None:
        return False
    limit, counted_from = settings.slo.ttft_ms, samples[0].due + settings.warmup_seconds
    warmup = warmup_of(samples, 0, settings.warmup_seconds)
    if now < counted_from:
        return False
    missed = sum(
        not is_good(s, settings.slo)
        if s.done
        else limit is not None and not s.arrivals and 1000 * (now - s.begun) > limit
        for s in samples[warmup:]
        if s.begun
    )
    return planned - warmup - missed < settings.share * (planned - warmup)


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
        dues = [s.due for s in samples if s.due is not None]
        offered = (len(dues) - 1) / (dues[-1] - dues[0])
        return answered >= KEPT_UP * offered, f"{answered:.3g} answers a second of {offered:.3g} requests"
    if best is None or best.figures is None:
        return True, f"{answered:.3g} answers a second"
    grown = figures.queries_per_minute / best.figures.queries_per_minute
    wanted = (load / best.load) ** GROWTH
    return grown >= wanted, f"{grown:.2f}x the answers a second for {load / best.load:.2f}x in flight"
