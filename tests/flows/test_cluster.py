"""A worker process is killed while it rounds, and the result has the bytes of a run in one process.

It is one run, as its command, since that has a Prefect server, Dask and workers to start.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from lightship.checkpoint import MANIFEST
from lightship.errors import LightshipError
from lightship.files import digest_of_file
from lightship.flows import needing_cluster_packages
from lightship.manifest import check_files
from lightship.quant.quantize import work_directory
from lightship.recipe import load_recipe
from tests.conftest import quantize_checkpoint, write_lines
from tests.tiny import write_fp8_checkpoint

EXPERTS = 12
RECIPE = """
model = "tiny"
[quantization]
sweeps = 8
[calibration]
tokens_per_scene = 1024
sequence_tokens = 256
sources = [{ scene = "prose", path = "prose.jsonl" }]
[cluster]
workers = 2
[accuracy]
questions = "puzzles"
[fidelity]
sources = [{ scene = "prose", path = "prose.jsonl" }]
[gate]
kl = 5.0
"""
SECONDS = 180


@dataclass(frozen=True)
class Survived:
    """A run on two workers, of which one was killed."""

    out: Path
    killed: int
    """Process id."""
    finished_by_killed: int
    """Experts in its journal."""
    finished: Counter[str]
    """How often each expert is in a worker's journal."""
    workers: set[int]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, a recipe and a checkpoint whose experts take long enough to be killed between two."""
    place = tmp_path_factory.mktemp("cluster")
    write_fp8_checkpoint(place / "source", n_routed_experts=EXPERTS, hidden_size=256, moe_intermediate_size=512)
    write_lines(place / "prose.jsonl", [f"The ship number {i} leaves the harbour at dawn." for i in range(80)])
    (place / "recipe.toml").write_text(RECIPE)
    return place


@pytest.fixture(scope="module")
def survived(place: Path, prefect_home: Path) -> Survived:
    """Quantize on a cluster, and kill the first worker that has an expert in its journal."""
    out, kept = place / "out", place / "journals"
    kept.mkdir()
    command = [sys.executable, "-m", "lightship", "quantize", "source", "out", "--recipe", "recipe.toml"]
    environment = os.environ | {"PREFECT_HOME": str(prefect_home), "LIGHTSHIP_DEVICE": "cpu"}
    with (place / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=place, env=environment, stdout=log, stderr=log, start_new_session=True, text=True
        )
        killed = 0
        try:
            deadline = time.monotonic() + SECONDS
            while process.poll() is None:
                assert time.monotonic() < deadline, (place / "log").read_text()
                journals = journals_of_workers(out, process.pid)
                for pid, journal in journals.items():
                    # A second name, since the run removes the first when it ends.
                    with suppress(FileExistsError, FileNotFoundError):
                        os.link(journal, kept / str(pid))
                    if not killed and finished(kept / str(pid)):
                        killed = pid
                        os.kill(pid, signal.SIGKILL)
                time.sleep(0.01)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, (place / "log").read_text()
    assert killed, "no worker has finished an expert"
    by_worker = {int(path.name): finished(path) for path in kept.iterdir()}
    return Survived(
        out, killed, len(by_worker[killed]), Counter(u for units in by_worker.values() for u in units), set(by_worker)
    )


@pytest.mark.slow
def test_a_cluster_with_a_killed_worker_gives_the_bytes_of_one_process(place: Path, survived: Survived) -> None:
    recipe = load_recipe(place / "recipe.toml")
    quantize_checkpoint(place / "source", place / "whole", recipe.calibration, recipe.quantization)
    assert digest_of_file(survived.out / MANIFEST) == digest_of_file(place / "whole" / MANIFEST)
    check_files(survived.out)


@pytest.mark.slow
def test_workers_round_every_expert_once_and_another_does_what_the_killed_one_left(survived: Survived) -> None:
    assert survived.finished == Counter({f"model.layers.1.mlp.experts.{e}": 1 for e in range(EXPERTS)})
    assert 0 < survived.finished_by_killed < 4, "the kill should be in the middle of a task"
    assert survived.workers > {survived.killed}
    assert not work_directory(survived.out).exists()


@pytest.mark.parametrize("package", ["prefect", "prefect_dask", "distributed"])
def test_a_missing_package_is_named_with_its_remedy(package: str) -> None:
    said = rf"needs the package {package}: pip install 'lightship\[cluster\]'"
    with pytest.raises(LightshipError, match=said), needing_cluster_packages():
        raise ModuleNotFoundError(name=package)


def test_any_other_failed_import_is_not_taken_for_a_missing_package() -> None:
    with pytest.raises(ImportError, match="broken"), needing_cluster_packages():
        raise ImportError("broken", name="prefect")
    with pytest.raises(ModuleNotFoundError, match="other"), needing_cluster_packages():
        raise ModuleNotFoundError("other", name="other")


def journals_of_workers(out: Path, driver: int) -> dict[int, Path]:
    """The journals of `out` by the process that writes each, without that of the process which runs the blocks."""
    found = {int(path.stem.rsplit("-", 1)[1]): path for path in work_directory(out).glob("journal-*.jsonl")}
    return {pid: path for pid, path in found.items() if pid != driver}


def finished(journal: Path) -> list[str]:
    """Units in a journal, as often as they are there."""
    units = []
    for line in journal.read_bytes().split(b"\n")[:-1]:
        with suppress(ValueError):
            units.append(json.loads(line)["unit"])
    return units
