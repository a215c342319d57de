"""A full disk is an error that says what to do, and nothing that was finished is lost. Needs the right to mount."""

import os
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lightship.checkpoint import MANIFEST
from lightship.errors import LightshipError
from lightship.files import digest_of_file
from lightship.quant import quantize as module
from lightship.quant.quantize import RESULT, work_directory
from lightship.recipe import CalibrationText, Quantization
from tests.conftest import quantize_checkpoint
from tests.tiny import write_fp8_checkpoint

MSE = Quantization(method="mse")
STASH_BYTES = 4096 * 128 * 4
"""A tensor of hidden states: tokens, hidden size, float32."""

Disk = Callable[[int], Path]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """Mounts a disk of so many bytes."""
    mounted: list[Path] = []

    def mount(nbytes: int) -> Path:
        path = tmp_path / f"disk{len(mounted)}"
        path.mkdir()
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", path], capture_output=True)
        if made.returncode:
            pytest.skip("mounting a small disk is not permitted here")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", "--lazy", path], check=True)


@pytest.fixture(scope="module")
def deep(text: CalibrationText, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(source, its result) with a layer after that of the first eight experts: what leaves theirs needs room."""
    folder = tmp_path_factory.mktemp("deep")
    source, whole = write_fp8_checkpoint(folder / "source", num_hidden_layers=3), folder / "whole"
    quantize_checkpoint(source, whole, text, MSE)
    return source, whole


def free(disk: Path) -> int:
    return os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize


def fill(disk: Path, leave: int) -> Path:
    """Take all but `leave` bytes of the disk, of which more must be free."""
    path = disk / f"filling{len(list(disk.glob('filling*')))}"
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free(disk) - leave)
    return path


def test_no_room_for_the_result_is_said_at_once_and_all_space_is_given_back(
    disk: Disk, fp8: Path, text: CalibrationText
) -> None:
    small = disk(600_000)
    before = free(small)
    with pytest.raises(LightshipError, match=r"no room for the result: it takes [\d.]+ MB, [\d.]+ [kM]B is free there"):
        quantize_checkpoint(fp8, small / "out", text, MSE, shard_bytes=200_000)
    assert not list((work_directory(small / "out") / RESULT).iterdir())
    assert before - free(small) < 32_768


@pytest.mark.parametrize("stash_memory", [1 << 30, 0], ids=["stash in memory", "stash on disk"])
def test_room_for_the_result_but_not_for_the_stash(
    disk: Disk, fp8: Path, w4afp8: Path, text: CalibrationText, stash_memory: int
) -> None:
    result = sum(p.stat().st_size for p in w4afp8.glob("*.safetensors"))
    large = disk(result + 6 * STASH_BYTES)
    filling = fill(large, result + STASH_BYTES // 2)
    with pytest.raises(LightshipError, match="is full; free some space and run the same command again"):
        quantize_checkpoint(fp8, large / "out", text, MSE, stash_memory=stash_memory)
    filling.unlink()
    quantize_checkpoint(fp8, large / "out", text, MSE, stash_memory=stash_memory)
    assert digest_of_file(large / "out" / MANIFEST) == digest_of_file(w4afp8 / MANIFEST)


@pytest.mark.parametrize("leave", [0, 8192], ids=["nothing left", "two pages left"])
@pytest.mark.parametrize("expert", [0, 1, 5, 7])
def test_a_disk_that_fills_in_the_middle(
    disk: Disk, deep: tuple[Path, Path], text: CalibrationText, expert: int, leave: int
) -> None:
    source, whole = deep
    large = disk(16_000_000)
    filling: list[Path] = []

    def progress(names: Iterable[str], _: str) -> Iterator[str]:
        for number, name in enumerate(names):
            # Again and again: what was needed no more is removed behind the computation.
            if number >= expert and free(large) >= leave + 4096:
                filling.append(fill(large, leave))
            yield name

    with pytest.raises(LightshipError, match="is full; free some space and run the same command again"):
        quantize_checkpoint(source, large / "out", text, MSE, progress=progress)
    assert not (large / "out").exists()
    for path in filling:
        path.unlink()
    quantize_checkpoint(source, large / "out", text, MSE)
    assert digest_of_file(large / "out" / MANIFEST) == digest_of_file(whole / MANIFEST)


def test_a_disk_that_fills_when_the_directory_is_finished(
    disk: Disk, fp8: Path, w4afp8: Path, text: CalibrationText, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = disk(16_000_000)
    filling: list[Path] = []

    def finish_on_a_full_disk(*args: Any) -> str:
        filling.append(fill(large, 0))
        return finish(*args)

    finish = module._finish
    monkeypatch.setattr(module, "_finish", finish_on_a_full_disk)
    with pytest.raises(LightshipError, match="is full; free some space and run the same command again"):
        quantize_checkpoint(fp8, large / "out", text, MSE)
    monkeypatch.undo()
    filling[0].unlink()
    assert quantize_checkpoint(fp8, large / "out", text, MSE).experts_resumed == 8
    assert digest_of_file(large / "out" / MANIFEST) == digest_of_file(w4afp8 / MANIFEST)
