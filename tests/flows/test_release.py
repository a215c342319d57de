"""A release from end to end, as its command: real servers, a real ephemeral Prefect, MLflow on SQLite."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lightship.checkpoint import INDEX
from lightship.files import read_json
from lightship.records import Accuracy, Agreement, Promoted, Staged, Throughput, Verdict
from lightship.release import ReleaseFile
from lightship.tracking import Tracker
from tests.conftest import write_lines
from tests.eval.puzzles import write_questions
from tests.servers import running
from tests.tiny import write_fp8_checkpoint

RECIPE = """
model = "tiny"
[quantization]
method = "{method}"
[calibration]
tokens_per_scene = 1024
sequence_tokens = 256
sources = [{{ scene = "prose", path = "prose.jsonl" }}]
[serving]
tp = 2
[accuracy]
questions = "puzzles"
max_tokens = 8
[fidelity]
tokens_per_scene = 512
sequence_tokens = 256
sources = [{{ scene = "prose", path = "prose.jsonl" }}]
[throughput]
concurrencies = [1, 2]
requests = 4
prompt_tokens = 32
output_tokens = 4
[gate]
kl = 5.0
experts_shrink = {shrink}
"""
pytestmark = pytest.mark.timeout(600)
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, texts, questions and a recipe."""
    place = tmp_path_factory.mktemp("release")
    write_fp8_checkpoint(place / "source", max_position_embeddings=4096)
    write_lines(place / "prose.jsonl", [f"The ship number {i} leaves the harbour at dawn." for i in range(40)])
    write_questions(place / "puzzles", {"biology": 3, "law": 3})
    (place / "recipe.toml").write_text(RECIPE.format(method="mse", shrink=0.45))
    return place


@pytest.fixture(scope="module")
def environment(prefect_home: Path) -> dict[str, str]:
    """A lightship home of its own, and MLflow and Prefect with servers of none but ours."""
    ours = os.environ | {"PREFECT_HOME": str(prefect_home), "LIGHTSHIP_HOME": "home"}
    return {name: value for name, value in ours.items() if name not in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL")}


@pytest.fixture(scope="module")
def lightship(place: Path, environment: dict[str, str]) -> Run:
    """Run `lightship` in `place`."""

    def run(*arguments: str | Path, **variables: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "lightship", *map(str, arguments)]
        return subprocess.run(
            command, cwd=place, env=environment | variables, capture_output=True, text=True, timeout=400
        )

    return run


@pytest.fixture(scope="module")
def released(lightship: Run, place: Path) -> tuple[Path, str]:
    """The first release's directory and what its command printed."""
    done = lightship("release", "source", "--recipe", "recipe.toml")
    assert done.returncode == 0, done.stdout + done.stderr
    (directory,) = (place / "home" / "releases").iterdir()
    return directory, done.stdout


def test_a_release_ends_promoted_with_every_record(released: tuple[Path, str]) -> None:
    directory, printed = released
    assert read_json(directory / "verdict.json", Verdict).decision == "pass"
    assert read_json(directory / "promoted.json", Promoted).alias == "champion"
    assert read_json(directory / "staged.json", Staged).tensor_parallel == 2
    assert len(read_json(directory / "accuracy.json", Accuracy).answers) == 6
    assert read_json(directory / "agreement.json", Agreement).questions == 6
    assert (directory / "answers.jsonl").read_bytes().count(b"\n") == 6
    assert read_json(directory / "throughput.json", Throughput).concurrencies == [1, 2]
    assert read_json(directory / "release.json", ReleaseFile).release_id == directory.name
    for said in ("the same text to", f"release {directory.name}", "routed experts", "verdict: pass", "report.html"):
        assert said in printed


def test_the_report_is_one_file_that_asks_nothing_of_the_network(released: tuple[Path, str]) -> None:
    html = (released[0] / "report.html").read_text()
    assert released[0].name in html
    assert "<svg" in html
    for reaching_out in ('src="http', 'href="http', "@import", "url(http"):
        assert reaching_out not in html


def test_no_server_outlives_the_release(released: tuple[Path, str]) -> None:
    port = int(read_json(released[0] / "staged.json", Staged).base_url.rsplit(":", 1)[1])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def test_mlflow_has_one_run_with_metrics_artifacts_and_both_aliases(
    released: tuple[Path, str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracker = Tracker.connect(place / "home")
    assert tracker.champion_release("tiny") == released[0].name
    run = tracker.find_run(released[0].name)
    assert run.info.status == "FINISHED"
    assert run.data.params["quantization.method"] == "mse"
    assert {"accuracy", "source/accuracy", "agreement/same_text", "fidelity/kl", "size/experts_shrink"} <= set(
        run.data.metrics
    )
    artifacts = {f.path for f in tracker.client.list_artifacts(run.info.run_id)}
    assert {
        "plan.json",
        "verification.json",
        "accuracy.json",
        "throughput.json",
        "verdict.json",
        "report.html",
    } <= artifacts
    assert not any(name.endswith(".safetensors") for name in artifacts)
    aliases = tracker.client.get_registered_model("tiny").aliases
    assert aliases["challenger"] == aliases["champion"]


def test_a_changed_recipe_is_another_release_that_goes_on_after_a_kill_and_fails_its_gate(
    released: tuple[Path, str], lightship: Run, place: Path, environment: dict[str, str]
) -> None:
    (place / "strict.toml").write_text(RECIPE.format(method="absmax", shrink=0.9))
    command = ("release", "source", "--recipe", "strict.toml")
    code, said = interrupt_after(place, environment, "plan.json", signal.SIGINT, *command)
    assert code == 130
    assert said == "lightship: interrupted; the same command goes on from the last finished stage\n"
    interrupt_after(place, environment, "calibration.json", signal.SIGKILL, *command)
    other = next(p for p in (place / "home" / "releases").iterdir() if p != released[0])
    (other / "checkpoint").mkdir(exist_ok=True)
    done = lightship("release", "source", "--recipe", "strict.toml")
    assert done.returncode == 1, done.stderr
    assert "verdict: fail; not promoted: it stays challenger" in done.stdout
    assert "source-accuracy" in done.stdout
    assert "(done before)" in next(line for line in done.stdout.splitlines() if "source-accuracy" in line)
    assert "(done before)" in next(line for line in done.stdout.splitlines() if line.startswith("  calibration"))
    assert "why not, in full in" in done.stdout
    receipt = other / "why-not.md"
    assert "## experts_shrink: fail" in receipt.read_text()
    assert "Shrink of the routed experts" in (other / "report.html").read_text()
    refused = lightship("promote", other.name[:6])
    assert refused.returncode == 2
    assert "not promoted, its verdict is fail" in refused.stderr
    assert str(receipt.relative_to(place)) in refused.stderr
    decided = lightship("decide", other.name[:6], "--policy", "recipe.toml")
    assert decided.returncode == 0, decided.stdout + decided.stderr
    signed = ("--override", "--by", "Ada", "--reason", "a rehearsal")
    overridden = lightship("promote", other.name[:6], *signed)
    assert overridden.returncode == 0, overridden.stderr
    assert "by Ada in spite of the verdict fail: a rehearsal" in overridden.stdout
    override = read_json(other / "promoted.json", Promoted).override
    assert override is not None
    assert override.rules == ["experts_shrink"]
    compared = lightship("compare", released[0].name[:6], other.name[:6])
    assert compared.returncode == 0, compared.stderr
    assert "quantization.method" in compared.stdout
    assert "answers in pairs: A" in compared.stdout
    promoted = lightship("promote", released[0].name[:6])
    assert promoted.returncode == 0, promoted.stderr
    assert "became champion" in promoted.stdout


def interrupt_after(
    place: Path, environment: dict[str, str], record: str, number: signal.Signals, *arguments: str
) -> tuple[int, str]:
    """Start `lightship` and signal its process group as soon as one more release has this record; exit code, stderr."""
    command = [sys.executable, "-m", "lightship", *arguments]
    records = len(list((place / "home" / "releases").glob(f"*/{record}")))
    process = subprocess.Popen(
        command, cwd=place, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 200
    while len(list((place / "home" / "releases").glob(f"*/{record}"))) == records:
        assert process.poll() is None, "it ended before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=30)
    return process.returncode, said.decode()


@dataclass(frozen=True)
class Again:
    """The first release's command once more, source and recipe spelled in another way, against a Prefect server."""

    printed: str
    before: dict[Path, int]
    """Files of the checkpoint and when they were written, before."""
    prefect: str
    """The server's API."""


@pytest.fixture(scope="module")
def again(released: tuple[Path, str], lightship: Run, place: Path, environment: dict[str, str]) -> Iterator[Again]:
    before = written(released[0] / "checkpoint")
    home = shutil.copytree(environment["PREFECT_HOME"], place / "prefect-server")
    server = running(
        "prefect",
        *("server", "start"),
        health="/api/health",
        log_file=place / "prefect.log",
        environment=environment | {"PREFECT_HOME": str(home)},
    )
    with server as url:
        api = f"{url}/api"
        done = lightship("release", place / "source", "--recipe", place / "recipe.toml", PREFECT_API_URL=api)
        assert done.returncode == 0, done.stderr
        yield Again(done.stdout, before, api)


def written(folder: Path) -> dict[Path, int]:
    """When each file of a folder was written, in nanoseconds."""
    return {path: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_another_spelling_of_the_same_source_is_the_same_release(
    released: tuple[Path, str], again: Again, place: Path
) -> None:
    assert f"release {released[0].name} of {place / 'source'}" in again.printed
    assert released[0] in (place / "home" / "releases").iterdir()


def test_run_twice_it_does_no_work_and_says_so(released: tuple[Path, str], again: Again) -> None:
    assert "every stage was done before; no work was repeated" in again.printed
    assert written(released[0] / "checkpoint") == again.before


def test_against_a_prefect_server_the_run_and_its_tasks_are_recorded(again: Again, place: Path) -> None:
    def ask(what: str, **where: object) -> list[dict]:
        request = urllib.request.Request(
            f"{again.prefect}/{what}/filter", json.dumps(where).encode(), {"Content-Type": "application/json"}
        )
        return json.load(urllib.request.urlopen(request, timeout=10))

    (run,) = ask("flow_runs", flow_runs={"name": {"any_": [f"release-{place / 'source'}"]}})
    assert run["state_type"] == "COMPLETED"
    of_run = ask("task_runs", flow_runs={"id": {"any_": [run["id"]]}})
    tasks = {task["name"].rsplit("-", 1)[0] for task in of_run}
    assert {"plan_tensors", "quantize_experts", "evaluate_quantized", "decide", "promote_champion"} <= tasks


def test_bad_input_ends_the_release_with_one_message_and_leaves_nothing(lightship: Run, place: Path) -> None:
    broken = shutil.copytree(place / "source", place / "broken")
    shard = sorted(set(json.loads((broken / INDEX).read_text())["weight_map"].values()))[0]
    (broken / shard).unlink()
    before = sorted((place / "home" / "releases").iterdir())
    done = lightship("release", "broken", "--recipe", "recipe.toml")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"{shard} is missing" in done.stderr
    (place / "wide.toml").write_text(RECIPE.format(method="mse", shrink=0.45).replace("tp = 2", "tp = 8"))
    indivisible = lightship("release", "source", "--recipe", "wide.toml")
    assert indivisible.returncode == 2
    assert "serves at TP 8, which source cannot be divided by" in indivisible.stderr
    asked = RECIPE.format(method="mse", shrink=0.45).replace("[accuracy]\n", '[accuracy]\ntasks = ["gsm8q"]\n')
    (place / "odd.toml").write_text(asked)
    unknown = lightship("release", "source", "--recipe", "odd.toml")
    assert unknown.returncode == 2
    assert "lm-eval has no task 'gsm8q'; the nearest are" in unknown.stderr
    assert sorted((place / "home" / "releases").iterdir()) == before
