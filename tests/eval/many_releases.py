"""Releases as if they had been finished: their records in a home and a run each in MLflow, with numbers that differ."""

import random
from dataclasses import replace
from functools import cache
from pathlib import Path

import msgspec

from lightship.checkpoint import Checkpoint
from lightship.files import write_json
from lightship.recipe import Quantization, load_recipe
from lightship.records import Record
from lightship.release import Identity, Release, ReleaseFile, StageDone, versions
from lightship.tracking import Tracker
from tests.eval.release import fidelity, plan, release, throughput

ROOT = Path(__file__).parents[2]
METHODS = ("gptq", "mse", "absmax")


@cache
def source() -> Checkpoint:
    return Checkpoint.open(ROOT / "demo" / "checkpoint")


def finish_release(home: Path, tracker: Tracker, number: int, questions: int = 700, promote: bool = False) -> str:
    """Make one release in `home` and its run; returns the release id. The same number gives the same release."""
    rng = random.Random(number)
    method = METHODS[number % len(METHODS)]
    recipe = load_recipe(ROOT / "recipes" / "demo.toml")
    settings = Quantization(method=method, damping=rng.choice((0.005, 0.01, 0.02)))  # type: ignore[arg-type]
    recipe = msgspec.structs.replace(recipe, quantization=settings)
    digest = [f"{rng.getrandbits(256):064x}" for _ in range(3)]
    identity = Identity(
        source="9d1e" * 16, recipe=digest[0], texts="7e57" * 16, questions="a5ed" * 16, code=digest[1], engine="e6" * 32
    )
    work = Release(home, source(), recipe, ROOT / "recipes" / "demo.toml", identity)
    worse = METHODS.index(method)
    data = release(
        losing=0.004 + 0.02 * worse + 0.01 * rng.random(),
        questions=questions,
        seed=number + 1,
        plan=plan(experts_after=52_000_000 + rng.randrange(3_000_000)),
        fidelity=fidelity(kl=0.012 + 0.02 * worse + 0.004 * rng.random()),
        throughput=throughput(1.1 + 0.3 * rng.random()),
    )
    quantized = replace(data, release_id=work.release_id).quantized
    stages: dict[str, Record] = {
        "plan": data.plan, "quantized": msgspec.structs.replace(quantized, method=method),
        "calibration": data.calibration, "verification": data.verification, "staged": data.staged,
        "source-accuracy": data.source_accuracy, "accuracy": data.quantized_accuracy, "throughput": data.throughput,
        "fidelity": data.fidelity, "agreement": data.agreement, "comparison": data.comparison, "verdict": data.verdict,
    }  # fmt: skip
    work.directory.mkdir(parents=True)
    about = ReleaseFile(
        release_id=work.release_id, identity=identity, source=str(work.source.path),
        recipe_path=str(work.recipe_path), recipe=recipe, versions=versions(),
    )  # fmt: skip
    write_json(work.directory / "release.json", about)
    with tracker.run_of(work.release_id, f"{recipe.model}-{work.release_id}") as run:
        run.log_release(work)
        version = ""
        for name, record in stages.items():
            write_json(work.directory / f"{name}.json", record)
            run.log_stage(StageDone(name, record, False, 1.5), work.directory)
            if name == "verification":
                version = tracker.register(
                    run.run_id, recipe.model, work.release_id, work.checkpoint_dir, quantized.manifest_digest
                )
        run.log_verdict(data.verdict)
        if promote:
            tracker.promote(recipe.model, version)
    return work.release_id
