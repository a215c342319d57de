"""What a release is called depends on what decides its result, and on nothing else."""

import shutil
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from lightship import release
from lightship.checkpoint import Checkpoint
from lightship.errors import LightshipError
from lightship.policy import Gate
from lightship.recipe import (
    AccuracyTask,
    CalibrationText,
    Cluster,
    FidelityText,
    Quantization,
    Recipe,
    TaskSource,
)
from lightship.release import Identity, digest_of_code, evaluation_directory, identify
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


@pytest.mark.parametrize("changed", ["a question", "a task's data", "how they are asked"])
def test_what_is_asked_and_how_makes_another_release(changed: str, fp8: Path, recipe: Recipe, tmp_path: Path) -> None:
    data = tmp_path / "gsm8k"
    data.mkdir()
    (data / "test.jsonl").write_text('{"question": "1 + 1?"}\n')
    asked = replace(recipe.accuracy, tasks=[TaskSource(name="gsm8k", path=str(data))])
    before = identity(fp8, recipe, accuracy=asked)
    moved = replace(asked, tasks=[TaskSource(name="gsm8k", path=str(shutil.copytree(data, tmp_path / "moved")))])
    assert identity(fp8, recipe, accuracy=moved) == before, "where they lie does not count"
    if changed == "a question":
        write_questions(tmp_path / "puzzles", {"law": 4})
    elif changed == "a task's data":
        (data / "test.jsonl").write_text('{"question": "1 + 2?"}\n')
    else:
        asked = replace(asked, api="chat")
    assert identity(fp8, recipe, accuracy=asked) != before


def test_the_hubs_questions_cannot_be_named_without_the_hub(fp8: Path, recipe: Recipe) -> None:
    with pytest.raises(LightshipError, match="dataset TIGER-Lab/MMLU-Pro/test cannot be read"):
        identity(fp8, recipe, accuracy=AccuracyTask())


def test_an_evaluation_of_a_url_outlives_an_upgrade_and_one_of_a_checkpoint_does_not(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def places() -> list[Path]:
        return [evaluation_directory(Path("home"), target, recipe) for target in ("http://a:1", "http://b:1", "a")]

    before = places()
    monkeypatch.setattr(release, "digest_of_code", lambda: "of other code")
    assert [old == new for old, new in zip(before, places(), strict=True)] == [True, True, False]
    assert len(set(before)) == 3


def test_a_process_that_lives_on_names_the_code_that_it_has_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = digest_of_code()
    monkeypatch.setattr(release, "digest_of_file", lambda _: "of a file that an upgrade has put in its place")
    assert digest_of_code() == loaded
