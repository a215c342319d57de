"""Workers as users run them: Dask's own commands on a machine, and those that the recipe starts, interrupted."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightship.flows.cluster import _deaf_to_interrupts
from lightship.quant.quantize import ROUTING, STASH, work_directory
from tests.conftest import write_lines
from tests.eval.puzzles import write_questions
from tests.quant.test_quantize import poison
from tests.tiny import write_fp8_checkpoint

RECIPE = """
model = "tiny"
[calibration]
tokens_per_scene = 1024
sequence_tokens = 256
sources = [{ scene = "prose", path = "prose.jsonl" }]
[accuracy]
questions = "puzzles"
[fidelity]
tokens_per_scene = 512
sequence_tokens = 256
sources = [{ scene = "prose", path = "prose.jsonl" }]
[throughput]
prompt_tokens = 32
[gate]
kl = 5.0
[cluster]
"""
SECONDS = 180


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, a text and questions."""
    place = tmp_path_factory.mktemp("workers")
    write_fp8_checkpoint(place / "source")
    write_lines(place / "prose.jsonl", [f"The ship number {i} leaves the harbour at dawn." for i in range(80)])
    write_questions(place / "puzzles", {"biology": 3, "law": 3})
    return place


@pytest.fixture(scope="module")
def environment(place: Path) -> dict[str, str]:
    return os.environ | {"PREFECT_HOME": str(place / "prefect"), "LIGHTSHIP_HOME": "home", "LIGHTSHIP_DEVICE": "cpu"}


@pytest.fixture
def scheduler(place: Path, environment: dict[str, str]) -> Iterator[str]:
    """The address of `dask scheduler`, with one `dask worker` that logs to worker.log."""
    dask, file = [sys.executable, "-m", "dask"], place / "scheduler.json"
    common = ["--scheduler-file", str(file), "--host", "127.0.0.1"]
    commands = {
        "scheduler": [*dask, "scheduler", *common, "--port", "0", "--no-dashboard"],
        "worker": [*dask, "worker", *common, "--nthreads", "1", "--no-dashboard"],
    }
    processes = []
    try:
        for name, command in commands.items():
            log = (place / f"{name}.log").open("w")
            processes.append(
                subprocess.Popen(command, cwd=place, env=environment, stdout=log, stderr=log, start_new_session=True)
            )
        wait_for(file, processes[0])
        yield json.loads(file.read_text())["address"]
    finally:
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.slow
def test_the_error_of_a_worker_elsewhere_ends_the_release_with_one_line(
    place: Path, environment: dict[str, str], scheduler: str
) -> None:
    name = poison(place / "source")
    (place / "external.toml").write_text(f'{RECIPE}scheduler = "{scheduler}"\n')
    done = subprocess.run(
        [sys.executable, "-m", "lightship", "release", "source", "--recipe", "external.toml"],
        cwd=place, env=environment, capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"the tensor {name} has 1 values that are NaN" in done.stderr
    assert done.stderr.startswith("lightship: error: ")
    assert done.stderr.count("\n") == 1
    assert f"the tensor {name}" in (place / "worker.log").read_text(), "it was met there"


@pytest.mark.slow
def test_ctrl_c_ends_the_workers_too_and_says_one_thing(place: Path, environment: dict[str, str]) -> None:
    (place / "workers.toml").write_text(f"{RECIPE}workers = 2\n")
    command = [sys.executable, "-m", "lightship", "quantize", "source", "out", "--recipe", "workers.toml"]
    with (place / "log").open("w+") as log:
        process = subprocess.Popen(command, cwd=place, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_for(work_directory(place / "out") / STASH / ROUTING, process)
            assert len(session(process.pid)) > 2, "it has workers"
            os.killpg(process.pid, signal.SIGINT)
            assert process.wait(30) == 128 + signal.SIGINT
            deadline = time.monotonic() + 30
            while session(process.pid) and time.monotonic() < deadline:
                time.sleep(0.1)
            assert session(process.pid) == []
        finally:
            for left in session(process.pid):
                os.kill(left, signal.SIGKILL)
        plan, *said = (place / "log").read_text().splitlines()
    assert plan.startswith("plan ")
    assert said == ["lightship: interrupted; the same command goes on from the last finished stage"]


def test_what_is_started_deaf_to_interrupts_is_so_from_its_first_moment_and_we_are_not() -> None:
    ask = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    said = _deaf_to_interrupts(lambda: subprocess.check_output([sys.executable, "-c", ask], text=True))
    assert said == "True\n"
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def wait_for(path: Path, process: "subprocess.Popen[bytes]") -> None:
    """Wait until the process has made this file."""
    deadline = time.monotonic() + SECONDS
    while not path.is_file():
        assert process.poll() is None, "it ended before that"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def session(leader: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of = stat.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(of) == leader and state != "Z":
            found.append(int(stat.parent.name))
    return found
