"""What a release is called depends on what decides its result, and on nothing else."""

from pathlib import Path

import msgspec
import pytest

from lightship import release
from lightship.checkpoint import Checkpoint
from lightship.policy import Gate
from lightship.recipe import AccuracyTask, CalibrationText, Cluster, FidelityText, Quantization, Recipe
from lightship.release import Identity, digest_of_code, identify
from tests.eval.puzzles import write_questions


@pytest.fixture
def recipe(text: CalibrationText, tmp_path: Path) -> Recipe:
    write_questions(tmp_path / "puzzles", {"law": 3})
    return Recipe(
        model="tiny",
        calibration=text,
        accuracy=AccuracyTask(questions=str(tmp_path / "puzzles")),
        fidelity=FidelityText(sources=text.sources, tokens_per_scene=512),
        gate=Gate(kl=1.0),
    )


def identity(fp8: Path, recipe: Recipe, **changes: object) -> Identity:
    return identify(Checkpoint.open(fp8), msgspec.structs.replace(recipe, **changes))


@pytest.mark.parametrize("cluster", [Cluster(workers=2), Cluster(scheduler="tcp://host:8786")])
def test_a_cluster_makes_no_other_release(fp8: Path, recipe: Recipe, cluster: Cluster) -> None:
    assert identity(fp8, recipe, cluster=cluster) == identity(fp8, recipe)


def test_another_method_makes_another_release(fp8: Path, recipe: Recipe) -> None:
    assert identity(fp8, recipe, quantization=Quantization(method="mse")) != identity(fp8, recipe)


def test_a_process_that_lives_on_names_the_code_that_it_has_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = digest_of_code()
    monkeypatch.setattr(release, "digest_of_file", lambda _: "of a file that an upgrade has put in its place")
    assert digest_of_code() == loaded
