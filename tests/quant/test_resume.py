"""kill -9 at any moment, and the same command goes on from the last finished expert, to the same bytes.

The killed processes are real: they are forked from a server that has imported everything, and send themselves SIGKILL
before the n-th thing they do to the disk, or in the middle of it.
"""

import json
import os
import random
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from lightship.checkpoint import MANIFEST
from lightship.errors import LightshipError
from lightship.files import LOCK, digest_of_file
from lightship.manifest import check_files
from lightship.quant import pipeline
from lightship.quant import quantize as module
from lightship.quant.quantize import RESULT, work_directory
from lightship.recipe import CalibrationText, Quantization
from tests.commands import FORK
from tests.conftest import quantize_checkpoint, write_lines
from tests.tiny import write_fp8_checkpoint

DEEDS = ("pwrite", "fsync", "fdatasync", "rename", "replace", "unlink", "mkdir", "rmdir", "posix_fallocate")
KILLS = 10
"""For each place of the stash: 20 in all."""
SHARD_BYTES = 400_000
SECONDS = 60


@dataclass(frozen=True)
class Command:
    """The arguments of one quantization."""

    source: Path
    out: Path
    text: CalibrationText
    stash_memory: int | None = None


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory, text: CalibrationText) -> Command:
    """GPTQ on a checkpoint with an MTP layer."""
    folder = tmp_path_factory.mktemp("resume")
    source = write_fp8_checkpoint(folder / "source", mtp=True)
    return Command(source, folder / "whole", msgspec.structs.replace(text, tokens_per_scene=1024))


@pytest.fixture(scope="module")
def whole(command: Command) -> tuple[str, int]:
    """(digest of the manifest, deeds) of a run that nothing interrupted."""
    code, deeds = run(command)
    assert code == 0
    return digest_of_file(command.out / MANIFEST), deeds


@pytest.mark.parametrize("stash_memory", [1 << 30, 0], ids=["stash in memory", "stash on disk"])
def test_kill_9_anywhere_leads_to_the_same_bytes(
    command: Command, whole: tuple[str, int], tmp_path: Path, stash_memory: int
) -> None:
    digest, deeds = whole
    chance = random.Random(stash_memory)
    command = replace(command, out=tmp_path / "out", stash_memory=stash_memory)
    steps = 0
    for _ in range(KILLS):
        before = rounded(command.out)
        code, _ = run(command, chance.randint(1, 5 * deeds // (2 * KILLS)))
        assert code == -signal.SIGKILL
        assert rounded(command.out) >= before
        assert not command.out.exists()
        steps += rounded(command.out) > before
    assert steps > 2, "the kills should be spread over the experts"
    done = rounded(command.out)
    assert set(done.values()) == {1}, "no finished expert is rounded again"
    code, _ = run(command)
    assert code == 0
    assert digest_of_file(command.out / MANIFEST) == digest
    check_files(command.out)
    assert resumed(command.out) == len(done)


def test_kill_9_while_the_directory_is_finished_leaves_nothing_behind(
    command: Command, whole: tuple[str, int], tmp_path: Path
) -> None:
    """From the first file beside the shards to the last that is tidied up."""
    ready = replace(command, out=tmp_path / "ready")
    quantize_up_to_the_end(ready)
    _, deeds = run(replace(ready, out=copy_of(ready.out, tmp_path / "count")))
    for seed, deed in enumerate(random.Random(0).sample(range(deeds), 12)):
        attempt = replace(command, out=copy_of(ready.out, tmp_path / f"out{seed}"))
        code, _ = run(attempt, deed + 1)
        assert code == -signal.SIGKILL
        work = work_directory(attempt.out)
        if work.exists() and any(work.iterdir()):
            assert run(attempt)[0] == 0, deed
            assert not work.exists(), deed
        assert digest_of_file(attempt.out / MANIFEST) == whole[0], deed
        check_files(attempt.out)


def test_work_that_was_half_tidied_up_is_no_hindrance(command: Command, whole: tuple[str, int], tmp_path: Path) -> None:
    """Killed after publication, the result since removed: whichever files of the work are left, it begins anew."""
    ready = replace(command, out=tmp_path / "ready")
    quantize_up_to_the_end(ready)
    for number, gone in enumerate(("fingerprint.json", "journal-*.jsonl", "stash", "nothing")):
        attempt = replace(command, out=copy_of(ready.out, tmp_path / f"out{number}"))
        work = work_directory(attempt.out)
        shutil.rmtree(work / RESULT)
        for path in work.glob(gone):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert run(attempt)[0] == 0, gone
        assert resumed(attempt.out) == 0
        assert digest_of_file(attempt.out / MANIFEST) == whole[0]


def test_a_torn_last_line_of_the_journal_is_ignored(fp8: Path, text: CalibrationText, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    settings = Quantization(method="mse")
    quantize_checkpoint(fp8, whole, text, settings)
    stop_after(3, fp8, out, text, settings)
    journal = max(work_directory(out).glob("journal-*.jsonl"), key=lambda p: p.stat().st_size)
    lines = journal.read_bytes().splitlines(keepends=True)
    before = rounded(out).total()
    torn = next(i for i in reversed(range(len(lines))) if b".experts." in lines[i])
    journal.write_bytes(b"".join(lines[:torn]) + lines[torn][: len(lines[torn]) // 2])
    assert quantize_checkpoint(fp8, out, text, settings).experts_resumed == before - 1
    assert digest_of_file(whole / MANIFEST) == digest_of_file(out / MANIFEST)


Inputs = tuple[CalibrationText, Quantization]


@pytest.mark.parametrize(
    ("said", "change"),
    [
        (r"recipe quantization\.damping: was 0\.01, is 0\.02", "recipe"),
        (r"calibration text: was [0-9a-f]{12}…, is [0-9a-f]{12}…", "text"),
        (r"recipe calibration\.sequence_tokens: was 256, is 128", "sequences"),
        (r"source model-00001-of-00002\.safetensors: was", "touched"),
        (r"source tokenizer_config\.json: was", "companion"),
        (r"lightship's code: was [0-9a-f]{12}…, is changed", "code"),
        (r"torch's threads: was \d+, is \d+", "threads"),
    ],
)
def test_other_inputs_are_refused_by_name_and_nothing_is_lost(
    broken: Path, text: CalibrationText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, change: str
) -> None:
    out, settings = tmp_path / "out", Quantization(method="gptq")
    prose = write_lines(tmp_path / "own.jsonl", [f"Line {i} of a text that will change." for i in range(80)])
    text = CalibrationText(
        sources=[msgspec.structs.replace(text.sources[0], path=str(prose))], tokens_per_scene=1024, sequence_tokens=256
    )
    stop_after(3, broken, out, text, settings)
    before = rounded(out)
    shard, companion = broken / "model-00001-of-00002.safetensors", broken / "tokenizer_config.json"
    shard_time, companion_bytes, prose_bytes = shard.stat().st_mtime_ns, companion.read_bytes(), prose.read_bytes()
    other_text, other_settings = text, settings
    match change:
        case "recipe":
            other_settings = msgspec.structs.replace(settings, damping=0.02)
        case "sequences":
            other_text = msgspec.structs.replace(text, sequence_tokens=128)
        case "text":
            prose.write_bytes(prose_bytes.replace(b"Line", b"Lime"))
        case "touched":
            os.utime(shard, ns=(shard_time, shard_time + 1_000_000_000))
        case "companion":
            companion.write_bytes(companion_bytes + b"\n")
        case "code":
            monkeypatch.setattr(module, "digest_of_code", lambda _: "changed")
        case "threads":
            monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    with pytest.raises(LightshipError, match=said) as refused:
        quantize_checkpoint(broken, out, other_text, other_settings)
    assert f"remove {work_directory(out)} to begin anew" in str(refused.value)
    assert rounded(out) == before
    os.utime(shard, ns=(shard_time, shard_time))
    companion.write_bytes(companion_bytes)
    prose.write_bytes(prose_bytes)
    monkeypatch.undo()
    assert quantize_checkpoint(broken, out, text, settings).experts_resumed == before.total() > 0


def test_a_shard_that_has_gone_is_refused(fp8: Path, text: CalibrationText, tmp_path: Path) -> None:
    out, settings = tmp_path / "out", Quantization(method="mse")
    stop_after(3, fp8, out, text, settings, shard_bytes=SHARD_BYTES)
    shard = min((work_directory(out) / RESULT).glob("*.safetensors"))
    shard.unlink()
    for _ in range(2):
        with pytest.raises(LightshipError, match=f"{shard.name} of work that was begun has gone or changed its size"):
            quantize_checkpoint(fp8, out, text, settings, shard_bytes=SHARD_BYTES)


def test_a_second_process_on_the_same_work_is_refused_at_once(command: Command, tmp_path: Path) -> None:
    command = replace(command, out=tmp_path / "out")
    begun, end = FORK.Event(), FORK.Event()
    first = FORK.Process(target=_quantize_and_wait, args=(command, begun, end))
    first.start()
    try:
        assert begun.wait(SECONDS)
        with pytest.raises(LightshipError, match=r"another process is working on .*out\.partial; wait for it to end"):
            quantize_checkpoint(command.source, command.out, command.text, Quantization())
    finally:
        end.set()
        first.join(SECONDS)
    assert first.exitcode == 0
    check_files(command.out)


def run(command: Command, kill_at: int = 0) -> tuple[int, int]:
    """Quantize in a process of its own, which kills itself at the given deed; returns (exit code, deeds)."""
    deeds = FORK.Value("i", 0)
    process = FORK.Process(target=_quantize, args=(command, kill_at, deeds))
    process.start()
    process.join(SECONDS)
    assert process.exitcode is not None, "hangs"
    return process.exitcode, deeds.value


def rounded(out: Path) -> Counter[str]:
    """How often each expert is in the journal."""
    lines = [line for p in work_directory(out).glob("journal-*.jsonl") for line in p.read_bytes().split(b"\n")[:-1]]
    units: Counter[str] = Counter()
    for line in lines:
        try:
            units[json.loads(line)["unit"]] += 1
        except ValueError:
            continue
    return Counter({unit: times for unit, times in units.items() if ".experts." in unit})


def resumed(out: Path) -> int:
    """Experts that the process which wrote `out` found finished."""
    return int(out.with_name(out.name + ".resumed").read_text())


def quantize_up_to_the_end(command: Command) -> None:
    """Leave work in which every block is finished, and the directory is not."""

    def stop(*_: object) -> None:
        raise StoppedError

    with pytest.MonkeyPatch.context() as patch, suppress(StoppedError):
        patch.setattr(module, "_finish", stop)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            _call(command)
        finally:
            torch.set_num_threads(threads)


def copy_of(out: Path, other: Path) -> Path:
    shutil.copytree(work_directory(out), work_directory(other), ignore=shutil.ignore_patterns(LOCK))
    return other


class StoppedError(Exception):
    """Ends a run from within, where it is."""


def stop_after(
    experts: int, source: Path, out: Path, text: CalibrationText, settings: Quantization, **options: Any
) -> None:
    """Quantize until so many experts are in the journal."""

    def progress(names: Iterable[str], _: str) -> Iterator[str]:
        for number, name in enumerate(names):
            if number >= experts:
                while rounded(out).total() < experts:
                    pass
                raise StoppedError
            yield name

    with pytest.raises(StoppedError):
        quantize_checkpoint(source, out, text, settings, progress=progress, **options)


def _call(command: Command, **options: Any) -> int:
    settings = Quantization(method="gptq", token_floor=64)
    options |= {"stash_memory": command.stash_memory, "shard_bytes": SHARD_BYTES}
    return quantize_checkpoint(command.source, command.out, command.text, settings, **options).experts_resumed


def _quantize(command: Command, kill_at: int, deeds: Any) -> None:
    torch.set_num_threads(1)
    lock = threading.Lock()

    def counted(do: Callable[..., Any]) -> Callable[..., Any]:
        def deed(*args: Any, **options: Any) -> Any:
            with lock:
                deeds.value += 1
                if deeds.value == kill_at:
                    if do is pwrite:
                        pwrite(args[0], args[1][: len(args[1]) // 2], args[2])
                    os.kill(os.getpid(), signal.SIGKILL)
            return do(*args, **options)

        return deed

    # Tiny experts are written faster than the disk can be waited for: few at a time, so that kills fall between them.
    pipeline.UNSYNCED = 1
    pwrite = os.pwrite
    for name in DEEDS:
        setattr(os, name, counted(getattr(os, name)))
    experts_resumed = _call(command)
    command.out.with_name(command.out.name + ".resumed").write_text(str(experts_resumed))


def _quantize_and_wait(command: Command, begun: Any, end: Any) -> None:
    torch.set_num_threads(1)

    def progress(names: Iterable[str], _: str) -> Iterator[str]:
        begun.set()
        end.wait(SECONDS)
        yield from names

    _call(command, progress=progress)
