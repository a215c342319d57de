"""The shards are safetensors files of bounded size, whatever the tensors, and written in place in any order."""

import json
import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from lightship.checkpoint import INDEX
from lightship.quant.layout import Shards
from lightship.quant.plan import PlannedOutput
from lightship.shards import BYTES_OF, read_header, torch_dtype

DTYPES = ("I8", "BF16", "F8_E4M3", "F32", "I64")
TENSORS = st.lists(
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(1, 9), max_size=3)), min_size=1, max_size=12
).map(lambda found: [PlannedOutput(f"t{i}", dtype, tuple(shape)) for i, (dtype, shape) in enumerate(found)])


def random_tensor(planned: PlannedOutput, seed: int) -> torch.Tensor:
    nbytes = planned.nbytes
    raw = torch.randint(0, 120, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return raw.view(torch_dtype(planned.dtype)).reshape(planned.shape)


@settings(deadline=None, max_examples=40)
@given(planned=TENSORS, shard_bytes=st.integers(1, 400), order=st.randoms(use_true_random=False))
def test_safetensors_reads_what_was_written(planned: list[PlannedOutput], shard_bytes: int, order: object) -> None:
    tensors = {p.name: random_tensor(p, i) for i, p in enumerate(planned)}
    with tempfile.TemporaryDirectory() as folder:
        shards = Shards(Path(folder), planned, shard_bytes)
        shards.reserve()
        names = list(tensors)
        order.shuffle(names)  # type: ignore[attr-defined]
        for name in names:
            shards.write(name, tensors[name])
        shards.sync()
        shards.write_index()
        index = json.loads((Path(folder) / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(p.nbytes for p in planned)
        assert set(index["weight_map"]) == set(tensors)
        assert shards.nbytes == sum((Path(folder) / name).stat().st_size for name in shards.names)
        for name, tensor in tensors.items():
            with safe_open(Path(folder) / index["weight_map"][name], framework="pt") as file:
                assert file.metadata() == {"format": "pt"}
                for read in (file.get_tensor(name), shards.read(name)):
                    assert read.dtype == tensor.dtype
                    assert read.shape == tensor.shape
                    assert read.flatten().view(torch.uint8).equal(tensor.flatten().view(torch.uint8))
        shards.close()


@settings(deadline=None, max_examples=40)
@given(planned=TENSORS, shard_bytes=st.integers(1, 400))
def test_every_tensor_is_aligned_and_no_shard_is_too_large(planned: list[PlannedOutput], shard_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shards = Shards(Path(folder), planned, shard_bytes)
        shards.reserve()
        shards.close()
        for name in shards.names:
            found = read_header(Path(folder) / name).values()
            assert len(found) == 1 or sum(t.nbytes for t in found) <= shard_bytes
            for tensor in found:
                assert tensor.offset % BYTES_OF[tensor.dtype] == 0
                assert tensor.nbytes == math.prod(tensor.shape) * BYTES_OF[tensor.dtype]


def test_reserving_again_changes_nothing(tmp_path: Path) -> None:
    planned = [PlannedOutput(f"t{i}", "F32", (16,)) for i in range(6)]
    first = Shards(tmp_path, planned, 128)
    assert [p.name for p in first.reserve()] == first.names == sorted(p.name for p in tmp_path.iterdir())
    for name in first.places:
        first.write(name, torch.full((16,), 7.0))
    first.close()
    second = Shards(tmp_path, planned, 128)
    assert second.missing() == second.reserve() == []
    assert all(second.read(name).eq(7).all() for name in second.places)
    second.close()


@pytest.mark.parametrize("change", ["gone", "shorter"])
def test_a_shard_that_is_not_whole_is_missing(tmp_path: Path, change: str) -> None:
    shards = Shards(tmp_path, [PlannedOutput(f"t{i}", "F32", (16,)) for i in range(6)], 128)
    shards.reserve()
    shards.close()
    path = tmp_path / shards.names[1]
    path.unlink() if change == "gone" else path.write_bytes(path.read_bytes()[:-1])
    assert shards.missing() == [path]
