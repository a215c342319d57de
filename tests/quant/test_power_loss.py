"""A name that later work relies on is on the disk: its directory is synced after it has the name, content first."""

import os
from pathlib import Path

import pytest
import torch

from lightship.files import write_text
from lightship.quant.journal import Journal
from lightship.quant.layout import Shards
from lightship.quant.plan import PlannedOutput
from lightship.quant.stash import Stash

Synced = list[tuple[Path, list[str]]]


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> Synced:
    """What was synced, in order: each file, and each directory with the names that it then had."""
    done: Synced = []

    def record(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        done.append((path, sorted(os.listdir(path)) if path.is_dir() else []))

    monkeypatch.setattr(os, "fsync", record)
    return done


@pytest.mark.parametrize("memory", [1 << 20, 0], ids=["in memory", "on disk"])
def test_a_saved_tensor(tmp_path: Path, synced: Synced, memory: int) -> None:
    stash = Stash(tmp_path / "stash", 6, 4, torch.bfloat16, memory)
    stash.save("x", stash.empty("x").zero_())
    assert synced == [(tmp_path / "stash" / "x.partial", []), (tmp_path / "stash", ["x"])]


def test_the_first_line_of_a_journal(tmp_path: Path, synced: Synced) -> None:
    journal = Journal(tmp_path)
    journal.append([("a", None)])
    (name,) = os.listdir(tmp_path)
    assert synced == [(tmp_path, [name]), (tmp_path / name, [])]
    journal.append([("b", None)])
    assert synced[2:] == [(tmp_path / name, [])], "once it has its name, the content is enough"


def test_the_places_of_the_shards(tmp_path: Path, synced: Synced) -> None:
    shards = Shards(tmp_path / "checkpoint", [PlannedOutput(f"t{i}", "F32", [8]) for i in range(3)], shard_bytes=32)
    shards.reserve()
    assert synced == [(tmp_path / "checkpoint", shards.names)]


def test_a_record(tmp_path: Path, synced: Synced) -> None:
    write_text(tmp_path / "plan.json", "{}")
    (content, _), (directory, names) = synced
    assert content.name.endswith(".partial")
    assert (directory, names) == (tmp_path, ["plan.json"])
