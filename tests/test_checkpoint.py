"""A damaged checkpoint is refused with one message that names the file or the tensor."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightship.checkpoint import INDEX, Checkpoint
from lightship.errors import CheckpointError

SHARD = "model-00001-of-00002.safetensors"


def index_of(path: Path) -> dict:
    return json.loads((path / INDEX).read_text())


def test_opening_reads_every_tensor_of_every_shard(fp8: Path) -> None:
    checkpoint = Checkpoint.open(fp8)
    assert set(checkpoint.tensors) == set(index_of(fp8)["weight_map"])
    assert checkpoint.nbytes == index_of(fp8)["metadata"]["total_size"]
    assert checkpoint.expert_layers() == {"model.layers.1.mlp": 8}


def test_a_missing_shard_is_named(broken: Path) -> None:
    (broken / SHARD).unlink()
    with pytest.raises(CheckpointError, match=f"{SHARD} is missing; .* places \\d+ tensors in it"):
        Checkpoint.open(broken)


@pytest.mark.parametrize("kept", [4, 100, 5000, -1])
def test_a_truncated_shard_is_named(broken: Path, kept: int) -> None:
    data = (broken / SHARD).read_bytes()
    (broken / SHARD).write_bytes(data[:kept])
    with pytest.raises(CheckpointError, match=f"{SHARD} is .*truncated"):
        Checkpoint.open(broken)


def test_a_tensor_missing_from_the_index_is_named(broken: Path) -> None:
    index = index_of(broken)
    del index["weight_map"]["model.norm.weight"]
    (broken / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"holds the tensor model\.norm\.weight, which .* does not place there"):
        Checkpoint.open(broken)


def test_a_tensor_missing_from_its_shard_is_named(broken: Path) -> None:
    index = index_of(broken)
    index["weight_map"]["model.extra"] = SHARD
    (broken / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lacks the tensor model\.extra"):
        Checkpoint.open(broken)


def test_a_directory_without_a_model_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json; give the directory of a release"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("companion", ["chat_template.jinja", "tokenizer.json", "config.json", "modeling.py"])
def test_the_digest_changes_with_a_companion(fp8: Path, broken: Path, companion: str) -> None:
    with (broken / companion).open("a") as file:
        file.write("\n")
    assert Checkpoint.open(broken).digest != Checkpoint.open(fp8).digest


def test_an_index_without_a_weight_map_is_named(broken: Path) -> None:
    (broken / INDEX).write_text("{}")
    with pytest.raises(CheckpointError, match="has no weight_map"):
        Checkpoint.open(broken)


def test_the_digest_changes_with_one_weight(fp8: Path, broken: Path) -> None:
    assert Checkpoint.open(broken).digest == Checkpoint.open(fp8).digest
    data = bytearray((broken / SHARD).read_bytes())
    data[-1] ^= 1
    (broken / SHARD).write_bytes(data)
    assert Checkpoint.open(broken).digest != Checkpoint.open(fp8).digest


@pytest.mark.parametrize("elsewhere", ["../{}", "{}/../x", "/etc/{}", "sub/{}"])
def test_a_weight_map_that_leaves_the_directory_is_refused_before_anything_is_opened(
    broken: Path, elsewhere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = index_of(broken)
    name = max(index["weight_map"])
    index["weight_map"][name] = elsewhere.format(SHARD)
    (broken / INDEX).write_text(json.dumps(index))
    monkeypatch.setattr("lightship.checkpoint.read_header", lambda path: pytest.fail(f"{path} was opened"))
    with pytest.raises(CheckpointError, match=f"places the tensor {name} in .*, which is not a file of the directory"):
        Checkpoint.open(broken)


def test_shards_may_be_symbolic_links_as_in_a_hub_cache(broken: Path, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (broken / SHARD).rename(tmp_path / "blobs" / "3f2a")
    (broken / SHARD).symlink_to(tmp_path / "blobs" / "3f2a")
    checkpoint = Checkpoint.open(broken)
    checkpoint.reader().read("model.norm.weight")
    assert {info.shard for info in checkpoint.tensors.values()} == {SHARD, SHARD.replace("00001-of", "00002-of")}


@pytest.fixture
def every_dtype(fp8: Path, tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    shutil.copy(fp8 / "config.json", tmp_path)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "f64": torch.randn(3, 5, dtype=torch.float64, generator=generator),
        "f32": torch.randn(7, generator=generator),
        "bf16": torch.randn(4, 6, 2, generator=generator).bfloat16(),
        "f16": torch.randn(4, 6, generator=generator).half(),
        "f8": torch.randn(5, 3, generator=generator).to(torch.float8_e4m3fn),
        "i64": torch.arange(6),
        "i32": torch.arange(6, dtype=torch.int32).reshape(2, 3),
        "i8": torch.arange(-3, 3, dtype=torch.int8),
        "bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3.5, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 4),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path, tensors


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def test_every_dtype_is_read_bit_for_bit(every_dtype: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, tensors = every_dtype
    reader = Checkpoint.open(path).reader()
    for name, tensor in tensors.items():
        read = reader.read(name)
        assert (read.dtype, read.shape, bits(read)) == (tensor.dtype, tensor.shape, bits(tensor)), name


@pytest.mark.parametrize(
    "parts", [(slice(1, 3),), (slice(None), slice(2, 4)), (slice(-2, None), slice(0, 1), slice(1, 2)), (slice(2, 2),)]
)
def test_parts_are_what_indexing_gives(
    every_dtype: tuple[Path, dict[str, torch.Tensor]], parts: tuple[slice, ...]
) -> None:
    path, tensors = every_dtype
    read = Checkpoint.open(path).reader().read("bf16", *parts)
    assert torch.equal(read, tensors["bf16"][parts])
    assert read.untyped_storage().nbytes() == read.nbytes


def test_a_slice_reads_its_own_bytes_alone(fp8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    preadv = os.preadv
    monkeypatch.setattr("os.preadv", lambda f, b, o: read.append(len(b[0])) or preadv(f, b, o))
    Checkpoint.open(fp8).reader().read("model.layers.1.mlp.experts.0.gate_proj.weight", slice(128, 256), slice(None))
    assert read == [128 * 128]


def test_threads_share_a_reader(fp8: Path) -> None:
    checkpoint = Checkpoint.open(fp8)
    reader, names = checkpoint.reader(), sorted(checkpoint.tensors)
    whole = {n: t for shard in checkpoint.shards for n, t in load_file(fp8 / shard).items()}
    with ThreadPoolExecutor(8) as threads:
        read = dict(zip(names, threads.map(reader.read, names), strict=True))
    assert all(bits(read[n]) == bits(whole[n]) for n in names)


def test_a_read_that_comes_short_names_the_file(broken: Path) -> None:
    checkpoint = Checkpoint.open(broken)
    name = max(checkpoint.tensors, key=lambda n: (checkpoint.tensors[n].shard == SHARD, checkpoint.tensors[n].offset))
    os.truncate(broken / SHARD, checkpoint.tensors[name].offset + 1)
    with pytest.raises(CheckpointError, match=f"{SHARD} ends at byte \\d+, within the tensor {name}"):
        checkpoint.reader().read(name)


def test_the_fingerprint_says_which_file_changed(broken: Path) -> None:
    checkpoint = Checkpoint.open(broken)
    before = checkpoint.fingerprint()
    assert before == Checkpoint.open(broken).fingerprint()
    assert {SHARD, "config.json", "tokenizer.json"} <= set(before)
    status = (broken / SHARD).stat()
    os.utime(broken / SHARD, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with (broken / "config.json").open("a") as file:
        file.write(" ")
    after = checkpoint.fingerprint()
    assert {name for name in before if before[name] != after[name]} == {SHARD, "config.json"}
