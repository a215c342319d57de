"""A damaged checkpoint is refused with one message that names the file or the tensor."""

import json
from pathlib import Path

import pytest

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
