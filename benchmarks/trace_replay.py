"""Does a replay hold the trace's arrival times? Real traces, against an instant server and the local engine.

TRACES is a folder with the published traces: azure_llm_2023_conv.csv, azure_llm_2023_code.csv and
mooncake_conversation_4000.jsonl. On the local engine, speed and lengths are chosen so that it can serve them on two
cores, which the client shares with it. Writes benchmarks/trace_replay.json and benchmarks/trace_replay.md.

    python -m benchmarks.trace_replay TRACES
"""

import argparse
import os
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from benchmarks.load_overhead import instant_server

from lightship.endpoint import Endpoint
from lightship.eval.load.measure import measure
from lightship.eval.load.prompts import read_prompt_text
from lightship.eval.load.traces import cut, read_trace
from lightship.eval.load.workload import Fit, from_trace
from lightship.eval.machine import describe_machine
from lightship.files import digest_of_file, write_json, write_text
from lightship.recipe import Serving
from lightship.records import LoadReport
from lightship.serving.launch import launched

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "demo" / "checkpoint"
TEXT = ROOT / "demo" / "text" / "prose" / "heldout.jsonl"
PORT = 18432
LIMIT_MS = 20
"""What a request may be late at the 99th percentile."""


@dataclass(frozen=True)
class Replay:
    """A trace, how fast and how long, and what becomes of its lengths."""

    server: str
    trace: str
    speed: float
    seconds: float
    fit: Fit
    factor: float | None = None


AZURE, CODE, MOONCAKE = "azure_llm_2023_conv.csv", "azure_llm_2023_code.csv", "mooncake_conversation_4000.jsonl"
REPLAYS = [
    Replay("instant", AZURE, 2.0, 60, "clip"),
    Replay("instant", CODE, 2.0, 60, "clip"),
    Replay("instant", MOONCAKE, 2.0, 60, "clip"),
    Replay("local", AZURE, 0.5, 120, "scale", 0.03),
    Replay("local", MOONCAKE, 0.25, 120, "scale", 0.005),
]


def main() -> None:
    """Replay every trace and write the result files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path, help="folder with the published traces")
    traces = parser.parse_args().traces
    rows = []
    with instant_server(PORT) as instant:
        rows += [replay(r, traces, instant) for r in REPLAYS if r.server == "instant"]
    with (
        tempfile.TemporaryDirectory() as work,
        launched(CHECKPOINT, Serving(), Path(work) / "serve.log") as server,
    ):
        local = Endpoint.connect(server.endpoint.base_url, CHECKPOINT)
        rows += [replay(r, traces, local) for r in REPLAYS if r.server == "local"]
    result = {
        "command": "python -m benchmarks.trace_replay TRACES",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine(),
        "replays": rows,
    }
    write_json(ROOT / "benchmarks" / "trace_replay.json", result)
    write_text(ROOT / "benchmarks" / "trace_replay.md", markdown(result))
    print(markdown(result))


def replay(what: Replay, traces: Path, endpoint: Endpoint) -> dict[str, Any]:
    """One replay's report, beside the load average of the machine when it ended."""
    path = traces / what.trace
    arrivals = cut(read_trace(path), what.speed, what.seconds, None)
    plan = from_trace(
        arrivals,
        read_prompt_text(TEXT, CHECKPOINT),
        endpoint.context_tokens or 2048,
        what.fit,
        f"{what.trace} at speed {what.speed:g}",
        factor=what.factor,
        digest=digest_of_file(path),
    )
    report: LoadReport = measure({what.server: endpoint}, plan)
    row = {"load_average": os.getloadavg()[0]} | msgspec.to_builtins(report)
    print(row["workload"]["name"], row["servers"][0]["lateness_ms"], flush=True)
    return row


def markdown(result: dict[str, Any]) -> str:
    """The result as a page."""
    heads = ["server", "trace", "requests, errors", "lengths", "repeated prefixes", "load average"]
    heads += ["TTFT p50 / p99, ms", "sent late p50 / p99 / most, ms", f"p99 within {LIMIT_MS} ms"]
    lines = [heads, ["---"] * len(heads)]
    for row in result["replays"]:
        about, [found] = row["workload"], row["servers"]
        late, first = found["lateness_ms"], found["time_to_first_token_ms"]
        cut_down = about["prompts_clipped"] + about["outputs_clipped"]
        lengths = f"x {about['length_factor']:.3g}" if about["length_factor"] != 1 else f"{cut_down} cut"
        lines.append(
            [
                *(found["server"], about["name"], f"{found['requests']}, {found['errors']}", lengths),
                *(f"{about['repeated_tokens']:.0%}", f"{row['load_average']:.1f}"),
                f"{first['p50']:.0f} / {first['p99']:.0f}",
                f"{late['p50']:.1f} / {late['p99']:.1f} / {late['max']:.1f}",
                "yes" if late["p99"] <= LIMIT_MS else "**no**",
            ]
        )
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return (
        "# Do replays hold the trace's arrival times?\n\n"
        f"`{result['command']}`, {result['date']}, {result['machine']}; others used the machine too, see the load "
        "average.\n\nLate is from the due time to the request's header handed to the socket. The client shares the "
        "cores with the server. `instant`\nis a server that answers at once, `local` lightship's engine with the demo "
        "model, at a speed and lengths that it can serve.\n\n"
        f"{table}\n"
    )


if __name__ == "__main__":
    main()
