"""What the load client itself costs: requests a second that it drives, and the latency that it adds.

It asks a server in another process that answers at once (benchmarks/instant_server.py), 32 tokens a request. So does
httpx, and a bare client that only writes bytes to a socket and reads them until the answer ends: its latency is the
server's and the machine's, and what another client takes beyond it is that client's own. Clients take turns.
Writes benchmarks/load_overhead.json and benchmarks/load_overhead.md.

    python -m benchmarks.load_overhead
"""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from lightship.endpoint import Endpoint
from lightship.errors import ServingError
from lightship.eval.load.client import Sample, open_client
from lightship.eval.load.drive import send_in_turn, send_on_time
from lightship.eval.load.figures import lateness_of
from lightship.eval.load.prompts import PromptText
from lightship.eval.load.workload import Request, at_rate
from lightship.eval.machine import describe_machine
from lightship.files import write_json, write_text

ROOT = Path(__file__).parents[1]
PORT = 18431
PROMPT_TOKENS, OUTPUT_TOKENS = 256, 32
CONCURRENCIES = (1, 16, 64)
REQUESTS = 600
ROUNDS = 3
RATES = (50, 100, 200, 400)
RATE_SECONDS = 6
TEXT = PromptText(range(10, 1000))


def main() -> None:
    """Measure and write the result files."""
    with instant_server(PORT) as endpoint:
        runs: dict[tuple[str, int], list[dict[str, float]]] = {}
        for number in range(ROUNDS):
            for concurrency in CONCURRENCIES:
                for name in list(CLIENTS)[:: 1 if number % 2 == 0 else -1]:
                    found = asyncio.run(CLIENTS[name](endpoint, requests_of(REQUESTS), concurrency))
                    runs.setdefault((name, concurrency), []).append(found)
        rates = [asyncio.run(at_a_rate(endpoint, rate)) for rate in RATES]
    rows = [
        {"client": name, "concurrency": concurrency}
        | {key: float(np.median([run[key] for run in found])) for key in found[0]}
        for (name, concurrency), found in runs.items()
    ]
    result = {
        "command": "python -m benchmarks.load_overhead",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine(),
        "load_average": os.getloadavg()[0],
        "prompt_tokens": PROMPT_TOKENS,
        "output_tokens": OUTPUT_TOKENS,
        "requests": REQUESTS,
        "rounds": ROUNDS,
        "in_turn": sorted(rows, key=lambda x: (x["concurrency"], list(CLIENTS).index(x["client"]))),
        "at_a_rate": rates,
    }
    write_json(ROOT / "benchmarks" / "load_overhead.json", result)
    write_text(ROOT / "benchmarks" / "load_overhead.md", markdown(result))
    print(markdown(result))


@contextmanager
def instant_server(port: int, pause: float = 0.0) -> Iterator[Endpoint]:
    """The server in a process of its own, until the block ends."""
    command = [sys.executable, "-m", "benchmarks.instant_server", str(port), "--pause", str(pause)]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        for _ in range(200):
            try:
                yield Endpoint.connect(f"http://127.0.0.1:{port}", ROOT / "demo" / "checkpoint")
                return
            except ServingError:
                time.sleep(0.1)
        raise SystemExit(f"no server on port {port}")
    finally:
        process.terminate()
        process.wait()


def requests_of(number: int) -> list[Request]:
    """Different prompts of one length."""
    return at_rate(1.0, TEXT, number, PROMPT_TOKENS, OUTPUT_TOKENS).requests


def summary(begun: float, cpu: float, samples: Sequence[Sample]) -> dict[str, float]:
    """Requests a second, this process's CPU time a request, and latencies in milliseconds."""
    assert all(s.error is None and s.generated == OUTPUT_TOKENS for s in samples), samples[0]
    first = [1000 * (s.arrivals[0] - s.begun) for s in samples]
    last = [1000 * (s.arrivals[-1] - s.begun) for s in samples]
    return {
        "requests_per_second": len(samples) / (time.perf_counter() - begun),
        "cpu_ms": 1000 * (time.process_time() - cpu) / len(samples),
        "first_p50_ms": float(np.percentile(first, 50)),
        "first_p99_ms": float(np.percentile(first, 99)),
        "last_p50_ms": float(np.percentile(last, 50)),
        "last_p99_ms": float(np.percentile(last, 99)),
    }


async def ours(endpoint: Endpoint, requests: Sequence[Request], concurrency: int) -> dict[str, float]:
    """lightship's own client."""
    async with open_client(endpoint) as client:
        await send_in_turn(client, requests[:20], concurrency)
        begun, cpu = time.perf_counter(), time.process_time()
        return summary(begun, cpu, await send_in_turn(client, requests, concurrency))


async def by_httpx(endpoint: Endpoint, requests: Sequence[Request], concurrency: int) -> dict[str, float]:
    """The same by httpx, as lightship did it before."""
    import httpx

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(timeout=60, limits=limits, trust_env=False) as client:

        async def ask(body: bytes, sample: Sample) -> None:
            sample.begun = time.perf_counter()
            async with client.stream("POST", f"{endpoint.base_url}/v1/completions", content=body) as response:
                async for line in response.aiter_lines():
                    now = time.perf_counter()
                    event = msgspec.json.decode(line[5:]) if line.startswith("data: {") else {}
                    if event.get("choices"):
                        sample.arrivals.append(now)
                    if event.get("usage"):
                        sample.generated = event["usage"]["completion_tokens"]

        return await _in_turn(endpoint, requests, concurrency, ask)


async def bare(endpoint: Endpoint, requests: Sequence[Request], concurrency: int) -> dict[str, float]:
    """Bytes written and read; nothing is parsed."""
    host, port = endpoint.base_url.removeprefix("http://").split(":")
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(body: bytes, sample: Sample) -> None:
        sample.begun = time.perf_counter()
        reader, writer = idle.pop() if idle else await asyncio.open_connection(host, int(port))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        end = b""
        while not end.endswith(b"0\r\n\r\n"):
            data = await reader.read(65536)
            assert data, "the server closed the connection"
            if b"data:" in data:
                sample.arrivals.append(time.perf_counter())
            end = (end + data)[-5:]
        sample.generated = OUTPUT_TOKENS
        idle.append((reader, writer))

    found = await _in_turn(endpoint, requests, concurrency, ask)
    for _, writer in idle:
        writer.close()
    return found


async def _in_turn(
    endpoint: Endpoint,
    requests: Sequence[Request],
    concurrency: int,
    ask: Callable[[bytes, Sample], Awaitable[None]],
) -> dict[str, float]:
    async with open_client(endpoint) as client:
        bodies = [client.body_of(r) for r in requests]
    await asyncio.gather(*(ask(b, Sample(None, OUTPUT_TOKENS)) for b in bodies[:concurrency]))
    samples = [Sample(None, OUTPUT_TOKENS) for _ in bodies]
    waiting = iter(list(zip(bodies, samples, strict=True)))

    async def work() -> None:
        for body, sample in waiting:
            await ask(body, sample)

    begun, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(work() for _ in range(concurrency)))
    return summary(begun, cpu, samples)


CLIENTS = {"bare socket": bare, "lightship (aiohttp)": ours, "httpx": by_httpx}


async def at_a_rate(endpoint: Endpoint, rate: float) -> dict[str, Any]:
    """How late Poisson arrivals leave at this rate."""
    plan = at_rate(rate, TEXT, int(rate * RATE_SECONDS), PROMPT_TOKENS, OUTPUT_TOKENS)
    async with open_client(endpoint) as client:
        samples = await send_on_time(client, plan.requests)
    late = lateness_of(samples)
    assert late is not None
    errors = sum(s.error is not None for s in samples)
    return {"rate": rate, "requests": len(samples), "errors": errors} | msgspec.to_builtins(late)


def markdown(result: dict[str, Any]) -> str:
    """The result as a page."""
    bases = {x["concurrency"]: x for x in result["in_turn"] if x["client"] == "bare socket"}
    heads = [
        "in flight",
        "client",
        "requests/s",
        "CPU a request, ms",
        "first token p50 / p99, ms",
        "beyond the bare socket",
    ]
    lines = [heads, ["---"] * len(heads)]
    for x in result["in_turn"]:
        base = bases[x["concurrency"]]
        beyond = [x[f"first_{p}_ms"] - base[f"first_{p}_ms"] for p in ("p50", "p99")]
        lines.append(
            [
                *(str(x["concurrency"]), x["client"], f"{x['requests_per_second']:.0f}", f"{x['cpu_ms']:.2f}"),
                f"{x['first_p50_ms']:.1f} / {x['first_p99_ms']:.1f}",
                "" if x is base else f"{beyond[0]:+.1f} / {beyond[1]:+.1f}",
            ]
        )
    rates = [["requests/s, Poisson", "requests", "errors", "sent late p50 / p99 / most, ms"], ["---"] * 4]
    rates += [
        [f"{x['rate']:g}", str(x["requests"]), str(x["errors"]), f"{x['p50']:.1f} / {x['p99']:.1f} / {x['max']:.1f}"]
        for x in result["at_a_rate"]
    ]
    tables = ["\n".join("| " + " | ".join(cells) + " |" for cells in rows) for rows in (lines, rates)]
    return (
        "# What the load client costs\n\n"
        f"`{result['command']}`, {result['date']}, {result['machine']}; others used the machine too, load average "
        f"{result['load_average']:.1f}.\n\n"
        f"A server in a process of its own answers {result['output_tokens']} tokens at once, an event each, to prompts "
        f"of {result['prompt_tokens']} tokens. Client and\nserver share the cores, and a bare socket that parses "
        f"nothing shows what is theirs. {result['requests']} requests, the median of {result['rounds']} rounds.\n"
        "Where a client drives as much as the bare socket, the server is the limit.\n\n"
        f"{tables[0]}\n\nHow late requests leave at a rate, from due to the header handed to the socket:\n\n"
        f"{tables[1]}\n"
    )


if __name__ == "__main__":
    main()
