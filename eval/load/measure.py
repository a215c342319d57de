"""A plan's requests sent to one server or, one after the other, to several, and reported.

measure({"server": Endpoint.connect(url, tokenizer)}, plan, slo=Slo(ttft_ms=500), warmup_requests=10)
"""

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

from lightship.endpoint import Endpoint
from lightship.eval.load.client import Sample, open_client
from lightship.eval.load.drive import send_in_turn, send_on_time
from lightship.eval.load.figures import figures_of, warmup_of
from lightship.eval.load.workload import LoadPlan
from lightship.eval.machine import describe_machine
from lightship.records import LoadReport, ServerFigures, Slo


def measure(
    servers: Mapping[str, Endpoint],
    plan: LoadPlan,
    slo: Slo | None = None,
    *,
    concurrency: int | None = None,
    warmup_requests: int = 0,
    warmup_seconds: float = 0.0,
) -> LoadReport:
    """Send the plan to each server and summarize what came back.

    Args:
        concurrency: of a plan without due times; None sends each request when it is due.
        warmup_requests: sent, but left out of the figures; as is what begins within `warmup_seconds`.

    Raises:
        EvaluationError: a server answered none of the requests after the warm-up.
    """
    found = []
    for name, endpoint in servers.items():
        samples = asyncio.run(_send(endpoint, plan, concurrency))
        where = f"the {name} server {endpoint.base_url} under {plan.about.name}"
        figures = figures_of(samples, where, slo, warmup_of(samples, warmup_requests, warmup_seconds))
        found.append(ServerFigures(server=name, **_fields(figures)))
    return LoadReport(
        client="lightship",
        workload=plan.about,
        servers=found,
        machine=describe_machine(),
        date=datetime.now(UTC).date().isoformat(),
    )


async def _send(endpoint: Endpoint, plan: LoadPlan, concurrency: int | None) -> list[Sample]:
    async with open_client(endpoint) as client:
        if concurrency is not None:
            return await send_in_turn(client, plan.requests, concurrency)
        return await send_on_time(client, plan.requests)


def _fields(record: msgspec.Struct) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__struct_fields__}
