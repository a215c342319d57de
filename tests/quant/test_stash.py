"""The stash gives back what was saved, from memory or from disk, and what is not saved is not there."""

from pathlib import Path

import pytest
import torch

from lightship.quant.stash import TENSORS, Stash

TOKENS, HIDDEN = 6, 4
NBYTES = TOKENS * HIDDEN * 2


def stash(directory: Path, memory: int) -> Stash:
    return Stash(directory / "stash", TOKENS, HIDDEN, torch.bfloat16, memory)


def test_the_budget_covers_all_tensors_that_are_alive_at_once(tmp_path: Path) -> None:
    assert not stash(tmp_path, TENSORS * NBYTES).on_disk
    assert stash(tmp_path, TENSORS * NBYTES - 1).on_disk


@pytest.mark.parametrize("memory", [1 << 20, 0])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_what_was_saved_is_loaded_by_another_process_object(
    tmp_path: Path, memory: int, dtype: torch.dtype | None
) -> None:
    first = stash(tmp_path, memory)
    tensor_TH = first.empty("x", dtype)
    assert tensor_TH.shape == (TOKENS, HIDDEN)
    tensor_TH[:] = torch.arange(TOKENS * HIDDEN).view(TOKENS, HIDDEN)
    first.save("x", tensor_TH)
    assert stash(tmp_path, 1 << 20).load("x", dtype).equal(tensor_TH)
    assert stash(tmp_path, 0).load("x", dtype).equal(tensor_TH)


@pytest.mark.parametrize("memory", [1 << 20, 0])
def test_a_new_tensor_of_a_name_leaves_the_saved_one_alone(tmp_path: Path, memory: int) -> None:
    ours = stash(tmp_path, memory)
    for value in (1.0, 2.0):
        tensor_TH = ours.empty("x").fill_(value)
        if value == 1.0:
            ours.save("x", tensor_TH)
    assert ours.load("x").eq(1).all()


def test_removing_removes_saved_and_unsaved(tmp_path: Path) -> None:
    ours = stash(tmp_path, 0)
    ours.save("x", ours.empty("x").zero_())
    ours.empty("x").zero_()
    ours.remove("x")
    ours.remove("never there")
    assert not list((tmp_path / "stash").iterdir())
