"""A command that was stopped when its result was out, but not its work tidied up, ends well when it is run again."""

import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lightship.checkpoint import MANIFEST
from lightship.errors import LightshipError
from lightship.manifest import check_files
from lightship.quant import quantize as module
from lightship.quant.quantize import RESULT, take_finished, work_directory
from lightship.recipe import Quantization, load_recipe
from lightship.records import Quantized
from tests.conftest import quantize_checkpoint, write_lines
from tests.test_cli import RECIPE, lightship, refusal


class StoppedError(Exception):
    """Ends a run where it is."""


@dataclass(frozen=True)
class Command:
    """`lightship quantize SOURCE OUT --recipe RECIPE`, stopped when OUT was published."""

    source: Path
    out: Path
    recipe: Path

    def run(self, **settings: Any) -> Quantized:
        recipe = load_recipe(self.recipe)
        return quantize_checkpoint(self.source, self.out, recipe.calibration, Quantization(**settings))


@pytest.fixture(scope="module")
def stopped(fp8: Path, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """Copy it."""
    place = tmp_path_factory.mktemp("stopped")
    write_lines(place / "prose.jsonl", [f"The ship number {i} leaves the harbour at dawn." for i in range(80)])
    (place / "recipe.toml").write_text(RECIPE)
    command = Command(fp8, place / "out", place / "recipe.toml")

    def stop(_: Path) -> None:
        raise StoppedError

    with pytest.MonkeyPatch.context() as patch, suppress(StoppedError):
        patch.setattr(module, "_tidy_up", stop)
        command.run()
    assert command.out.exists()
    assert work_directory(command.out).exists()
    return command


@pytest.fixture
def command(stopped: Command, tmp_path: Path) -> Command:
    return copy_of(stopped, tmp_path)


def copy_of(command: Command, place: Path) -> Command:
    shutil.copytree(command.out.parent, place, dirs_exist_ok=True)
    return Command(command.source, place / "out", place / "recipe.toml")


def test_the_same_command_tidies_up_and_gives_the_record_of_what_is_there(command: Command) -> None:
    before = (command.out / MANIFEST).stat().st_mtime_ns
    done = command.run()
    assert (done.path, done.experts, done.experts_resumed) == (str(command.out), 8, 8)
    assert not work_directory(command.out).exists()
    assert (command.out / MANIFEST).stat().st_mtime_ns == before, "nothing is written again"
    check_files(command.out)


def test_it_says_so_on_the_command_line_and_ends_with_success(command: Command) -> None:
    arguments = ("quantize", command.source, command.out, "--recipe", command.recipe)
    done = lightship(*arguments, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "finished     by an earlier run of this command" in done.stdout
    assert "8 experts, 8 of them finished before" in done.stdout
    assert "exists; remove it or name another directory" in refusal(*arguments)


def test_a_tidying_that_is_stopped_anywhere_is_taken_up(stopped: Command, tmp_path: Path) -> None:
    deeds = len(list(work_directory(stopped.out).iterdir()))
    assert deeds > 3
    for deed in range(deeds):
        command = copy_of(stopped, tmp_path / str(deed))
        stop_at(deed, work_directory(command.out))
        assert command.run().experts_resumed == 8, deed
        assert not work_directory(command.out).exists()


def test_another_command_is_refused_and_touches_nothing(command: Command) -> None:
    before = sorted(work_directory(command.out).rglob("*"))
    with pytest.raises(LightshipError, match="exists; remove it or name another directory"):
        command.run(damping=0.02)
    assert sorted(work_directory(command.out).rglob("*")) == before


def test_work_whose_result_is_not_out_is_not_mistaken_for_finished(command: Command) -> None:
    (work_directory(command.out) / RESULT).mkdir()
    with pytest.raises(LightshipError, match="exists; remove it or name another directory"):
        command.run()
    assert (work_directory(command.out) / RESULT).is_dir()


def test_a_release_that_takes_a_finished_checkpoint_tidies_up_too(command: Command) -> None:
    assert take_finished(command.out).experts == 8
    assert not work_directory(command.out).exists()


def stop_at(deed: int, work: Path) -> None:
    """Tidy up and stop before the given removal of an entry."""
    removed = 0

    def counted(remove: Any) -> Any:
        def counting(path: Path, *args: Any, **options: Any) -> None:
            nonlocal removed
            if path.parent == work:
                if removed == deed:
                    raise StoppedError
                removed += 1
            remove(path, *args, **options)

        return counting

    with pytest.MonkeyPatch.context() as patch, suppress(StoppedError):
        patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
        patch.setattr(Path, "unlink", counted(Path.unlink))
        module._tidy_up(work)
