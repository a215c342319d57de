"""Every way in which SGLang would serve nonsense without a word is a failed check that names the tensor."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightship.checkpoint import INDEX, MANIFEST
from lightship.manifest import describe_files, read_manifest, write_manifest
from lightship.quant.verify import verify

EXPERT = "model.layers.1.mlp.experts.2"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def copy(w4afp8: Path, tmp_path: Path) -> Path:
    return shutil.copytree(w4afp8, tmp_path / "copy")


def change_tensors(path: Path, change: Callable[[Tensors], object]) -> None:
    """Change tensors, and make index and manifest agree with it, so that only the check in question can object."""
    (shard,) = path.glob("*.safetensors")
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, metadata={"format": "pt"})
    (path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, shard.name)}))
    manifest = read_manifest(path)
    (path / MANIFEST).unlink()
    manifest.files.clear()
    manifest.files.update(describe_files(path))
    write_manifest(path, manifest)


def failures(path: Path, source: Path | None = None) -> dict[str, str]:
    return {check.name: check.detail for check in verify(path, source).checks if not check.passed}


def test_a_written_checkpoint_passes_and_reports_its_errors(w4afp8: Path, fp8: Path) -> None:
    verification = verify(w4afp8, fp8)
    assert verification.passed
    (layer,) = verification.layers
    assert 0.005 < layer.w13 < 0.012
    assert 0.005 < layer.w2 < 0.012


def test_a_missing_input_scale_names_the_tensor(copy: Path) -> None:
    change_tensors(copy, lambda t: t.pop(f"{EXPERT}.w2.input_scale"))
    assert failures(copy) == {"layout": f"{EXPERT}.w2.input_scale is missing"}


@pytest.mark.parametrize(
    ("name", "value", "check", "says"),
    [
        (f"{EXPERT}.w3.input_scale", 0.5, "input scales", "is 0.5, the layer's first is"),
        (f"{EXPERT}.w1.input_scale", 0.0, "input scales", "is 0.0, not positive"),
        (f"{EXPERT}.w2.input_scale", 0.1001, "input scales", "which bf16 cannot hold"),
        (f"{EXPERT}.up_proj.weight_scale_inv", torch.inf, "finite", "values that are NaN or infinite"),
    ],
)
def test_a_wrong_scale_names_the_tensor(copy: Path, name: str, value: float, check: str, says: str) -> None:
    def change(tensors: Tensors) -> None:
        old = tensors[name]
        tensors[name] = torch.full(old.shape, value, dtype=torch.float32 if value == 0.1001 else old.dtype)

    change_tensors(copy, change)
    found = failures(copy)
    assert set(found) == {check}
    assert name in found[check]
    assert says in found[check]


def test_a_wrong_shape_and_a_wrong_dtype_name_the_tensor(copy: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{EXPERT}.gate_proj.weight"] = tensors[f"{EXPERT}.gate_proj.weight"][:, :-1].contiguous()
        tensors[f"{EXPERT}.up_proj.weight"] = tensors[f"{EXPERT}.up_proj.weight"].float()

    change_tensors(copy, change)
    layout = failures(copy)["layout"]
    assert f"{EXPERT}.gate_proj.weight has shape [256, 63], not [256, 64]" in layout
    assert f"{EXPERT}.up_proj.weight is F32, not I8" in layout


def test_a_changed_file_is_caught_by_the_manifest(copy: Path) -> None:
    with (copy / "tokenizer.json").open("a") as file:
        file.write(" ")
    assert "tokenizer.json has changed since it was quantized" in failures(copy)["manifest"]


def test_a_changed_tensor_outside_the_experts_is_caught_against_the_source(copy: Path, fp8: Path) -> None:
    change_tensors(copy, lambda t: t["model.norm.weight"].mul_(2))
    assert failures(copy, fp8) == {"untouched": "model.norm.weight differs from the source"}


def test_weights_that_are_not_the_sources_fail_reconstruction(copy: Path, fp8: Path) -> None:
    change_tensors(copy, lambda t: t[f"{EXPERT}.up_proj.weight_scale_inv"].mul_(4))
    assert f"{EXPERT}.up_proj.weight: 8" in failures(copy, fp8)["reconstruction"]


def test_one_destroyed_tensor_among_good_ones_is_named(copy: Path, fp8: Path) -> None:
    change_tensors(copy, lambda t: t[f"{EXPERT}.gate_proj.weight"].zero_())
    assert failures(copy, fp8) == {"reconstruction": f"{EXPERT}.gate_proj.weight: 1 > 0.1"}


def test_a_stale_quantization_block_is_caught(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "fp8"
    (copy / "config.json").write_text(json.dumps(config))
    assert "quant_method is 'fp8', not 'w4afp8'" in failures(copy)["config"]


def test_a_missing_shard_is_a_failed_check_not_a_crash(copy: Path) -> None:
    for shard in copy.glob("*.safetensors"):
        shard.unlink()
    assert "is missing" in failures(copy)["opens"]
