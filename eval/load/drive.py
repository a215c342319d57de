"""Send a plan's requests: each at its due time, or so many at once; the result is a sample for each.

samples = await send_on_time(client, plan.requests)          # Poisson, traces: late answers delay nothing
samples = await send_in_turn(client, plan.requests, 8)       # fixed concurrency
"""

import asyncio
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from lightship.eval.load.client import Client, Sample
from lightship.eval.load.workload import Request

WATCH_SECONDS = 0.25
START_SECONDS = 0.05
"""Between the last preparation and the first due time."""


async def send_in_turn(client: Client, requests: Sequence[Request], concurrency: int) -> list[Sample]:
    """Keep `concurrency` requests in flight until all are answered."""
    samples = [Sample(None, r.output_tokens) for r in requests]
    waiting = iter(list(zip([client.body_of(r) for r in requests], samples, strict=True)))

    async def work() -> None:
        for body, sample in waiting:
            await client.ask(body, sample)

    with _without_garbage_collection():
        await asyncio.gather(*(work() for _ in range(concurrency)))
    return samples


async def send_on_time(
    client: Client,
    requests: Sequence[Request],
    *,
    patience: float | None = None,
    hopeless: Callable[[Sequence[Sample], float], bool] = lambda _, __: False,
) -> list[Sample]:
    """Send each request when it is due, whatever has become of those before it.

    Args:
        patience: seconds after the last due time at which what is still in flight is given up, as an error.
        hopeless: asked four times a second, with the samples so far and the time; if true, nothing more is sent and
            what is in flight is given up.

    Returns:
        A sample for each request that was due before it became hopeless.
    """
    bodies = [client.body_of(r) for r in requests]
    samples: list[Sample] = []
    flying: set[asyncio.Task[Sample]] = set()

    async def send() -> None:
        start = time.perf_counter() + START_SECONDS
        for request, body in zip(requests, bodies, strict=True):
            due = start + request.due
            # Awaited even when late, so that answers are read between two requests that are due at once.
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            samples.append(Sample(due, request.output_tokens))
            task = asyncio.create_task(client.ask(body, samples[-1]))
            flying.add(task)
            task.add_done_callback(flying.discard)
        await asyncio.wait(flying, timeout=patience) if flying else None

    with _without_garbage_collection():
        sending = asyncio.create_task(send())
        while not sending.done():
            await asyncio.wait([sending], timeout=WATCH_SECONDS)
            if hopeless(samples, time.perf_counter()):
                break
        given_up = [sending, *flying]
        for task in given_up:
            task.cancel()
        results = await asyncio.gather(*given_up, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
            raise result
    for sample in samples:
        if not sample.done:
            sample.fail("given up", "no end when the load ended")
    return samples


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """A full collection stops the program for tens of milliseconds, in which nothing is sent."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
