"""How long people wait when there are 200 releases: `lightship compare`, MLflow's API, and its pages in a browser.

The releases are fabricated: their records and runs are those of a finished one, with numbers that differ, made by the
same code that tracks a real one. Writes benchmarks/compare_runs.json and benchmarks/compare_runs.md.

    python -m benchmarks.compare_runs [--browser-python PYTHON]

PYTHON has playwright, and finds Chromium in CHROMIUM or its own; without it no page is opened.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lightship.contrast import CURVES
from lightship.eval.machine import describe_machine
from lightship.files import write_json, write_text
from lightship.tracking import EXPERIMENT, Tracker
from tests.eval.many_releases import finish_release
from tests.servers import running

ROOT = Path(__file__).parents[1]
COMMAND = "python -m benchmarks.compare_runs"
RELEASES = 200
REPEATS = 3


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--releases", type=int, default=RELEASES)
    arguments.add_argument("--browser-python", help="a Python with playwright")
    arguments.add_argument("--home", type=Path, help="use the releases there, or make them there")
    chosen = arguments.parse_args()
    busy = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        home = chosen.home or Path(scratch)
        ids = release_many(home, chosen.releases)
        waits = wait_for_commands(home, ids) + wait_for_server(home, Path(scratch), len(ids), chosen.browser_python)
        counts = count_metrics(home)
    result = {
        "command": COMMAND,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine(),
        "load_average": round(busy, 1),
        "releases": len(ids),
        **counts,
        "waits": waits,
    }
    write_json(ROOT / "benchmarks" / "compare_runs.json", result)
    write_text(ROOT / "benchmarks" / "compare_runs.md", as_markdown(result))


def release_many(home: Path, count: int) -> list[str]:
    """The ids of `count` releases in `home`, the first the champion; those that are there are not made again."""
    tracker = Tracker.connect(home)
    there = [side.release_id for side in tracker.sides()]
    made = [
        finish_release(home, tracker, number, questions=200, promote=number == 0) for number in range(len(there), count)
    ]
    return sorted(there + made)


def count_metrics(home: Path) -> dict[str, int]:
    tracker = Tracker.connect(home)
    (run,) = tracker.client.search_runs([tracker.experiment_id], max_results=1)
    curves = sum(name.startswith(CURVES) for name in run.data.metrics)
    return {"metrics_a_run": len(run.data.metrics), "curves_a_run": curves}


def wait_for_commands(home: Path, ids: list[str]) -> list[dict[str, Any]]:
    """The command line, each time in a new process."""
    commands = {
        "lightship compare A B": ["compare", ids[0], ids[1]],
        "lightship compare A champion --json": ["compare", ids[2], "champion", "--json"],
        f"lightship compare, all {len(ids)} releases": ["compare"],
    }
    lightship = [sys.executable, "-m", "lightship"]

    def runner(options: list[str]) -> Callable[[], object]:
        return lambda: subprocess.run([*lightship, *options, "--home", str(home)], check=True, capture_output=True)

    return [waited(what, runner(options)) for what, options in commands.items()]


def wait_for_server(home: Path, scratch: Path, runs: int, browser_python: str | None) -> list[dict[str, Any]]:
    """What MLflow's own pages ask of its server, and the pages."""
    store = f"sqlite:///{home / 'mlflow.db'}"
    options = ["server", "--workers", "1", "--backend-store-uri", store, "--artifacts-destination", str(scratch / "a")]
    with running("mlflow", *options, health="/health", log_file=scratch / "log", environment=os.environ) as url:
        api = f"{url}/ajax-api/2.0/mlflow"
        experiment = ask(f"{api}/experiments/get-by-name?experiment_name={EXPERIMENT}")["experiment"]["experiment_id"]
        wanted = {"experiment_ids": [experiment], "max_results": runs}
        found = [run["info"]["run_id"] for run in ask(f"{api}/runs/search", wanted)["runs"]]
        curve = "&".join(f"run_ids={run}" for run in found[:100])
        history = (
            f"{api}/metrics/get-history-bulk-interval?metric_key=by_layer/output_error_w13&max_results=320&{curve}"
        )
        sifted = wanted | {"filter": "metrics.`fidelity/kl` < 0.04 and tags.`lightship.verdict` = 'pass'"}
        waits = [
            waited(f"MLflow: search {runs} runs, all columns", lambda: ask(f"{api}/runs/search", wanted)),
            waited("MLflow: the same, those that pass with a KL below 0.04", lambda: ask(f"{api}/runs/search", sifted)),
            waited("MLflow: a curve by layer of 100 runs", lambda: ask(history)),
        ]
        if browser_python:
            script = [browser_python, str(ROOT / "benchmarks" / "compare_runs_browser.py"), url, experiment, *found]
            pages = json.loads(subprocess.run(script, check=True, stdout=subprocess.PIPE, text=True).stdout)
            waits += [wait_of(what, seconds) for what, seconds in pages.items()]
    return waits


def ask(url: str, body: object = None) -> Any:
    request = urllib.request.Request(url, data=None if body is None else json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def waited(what: str, act: Callable[[], object]) -> dict[str, Any]:
    """Seconds of each of a few times."""
    seconds = []
    for _ in range(REPEATS):
        start = time.monotonic()
        act()
        seconds.append(time.monotonic() - start)
    return wait_of(what, seconds)


def wait_of(what: str, seconds: list[float]) -> dict[str, Any]:
    return {"what": what, "median": statistics.median(seconds), "seconds": seconds}


def as_markdown(result: dict[str, Any]) -> str:
    rows = "\n".join(f"| {w['what']} | {w['median']:.1f} | {max(w['seconds']):.1f} |" for w in result["waits"])
    return (
        f"# Waiting with {result['releases']} releases\n\n"
        f"`{result['command']}`, {result['date']}, {result['machine']}, load average "
        f"{result['load_average']} before it began.\n\n"
        "The releases are fabricated, and tracked by the code that tracks real ones. "
        f"A run has {result['metrics_a_run']} metrics,\n{result['curves_a_run']} of them curves. SQLite holds them, "
        "one worker serves them. Seconds, of three times each; of a page, from\nits address until what it is for can "
        "be read.\n\n"
        f"| what | median | longest |\n| --- | --- | --- |\n{rows}\n"
    )


if __name__ == "__main__":
    main()
