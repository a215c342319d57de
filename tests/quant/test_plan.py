"""The plan says from headers alone what the quantized checkpoint will weigh."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lightship.checkpoint import Checkpoint
from lightship.errors import CheckpointError
from lightship.quant.plan import plan_quantization, planned_outputs
from lightship.w4afp8 import quantize_fp8_blocks
from tests.tiny import FAMILIES, write_checkpoint, write_fp8_checkpoint, write_shards


def test_the_planned_size_is_the_written_size(fp8: Path, w4afp8: Path) -> None:
    assert plan_quantization(Checkpoint.open(fp8)).bytes_after == Checkpoint.open(w4afp8).nbytes


def test_only_routed_experts_become_int4(fp8: Path) -> None:
    plan = plan_quantization(Checkpoint.open(fp8))
    chosen = {action: [t.name for t in plan.tensors if t.action == action] for action in ("int4", "fp8", "keep")}
    assert all(".experts." in name for name in chosen["int4"])
    assert any("shared_experts" in name for name in chosen["fp8"])
    assert not any(".mlp.experts." in name for name in chosen["fp8"] + chosen["keep"])
    assert {"model.norm.weight", "lm_head.weight", "model.layers.1.mlp.gate.weight"} <= set(chosen["keep"])
    assert plan.experts_shrink > 0.45


def test_tensor_parallel_degrees_keep_whole_groups(tmp_path: Path) -> None:
    path = write_fp8_checkpoint(
        tmp_path / "wide", moe_intermediate_size=1024, n_routed_experts=4, num_experts_per_tok=2
    )
    assert plan_quantization(Checkpoint.open(path)).tensor_parallel == [1, 2, 4, 8]


def test_a_missing_expert_is_named(broken: Path) -> None:
    change_config(broken, lambda config: config | {"n_routed_experts": 16})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp has 8 routed experts, config\.json asks for 16"):
        plan_quantization(Checkpoint.open(broken))


def test_a_size_that_is_no_multiple_of_128_is_named(broken: Path) -> None:
    change_config(broken, lambda config: config | {"moe_intermediate_size": 200})
    with pytest.raises(CheckpointError, match="moe_intermediate_size 200 is not a multiple of 128"):
        plan_quantization(Checkpoint.open(broken))


@pytest.mark.parametrize("fp8", [False, True])
def test_a_dense_mlp_that_is_not_whole_blocks_is_refused_with_the_reason(fp8: bool, tmp_path: Path) -> None:
    path = write_checkpoint("glm4_moe", tmp_path / "air", fp8=fp8, intermediate_size=320)
    said = r"SGLang refuses .* every degree .*: model\.layers\.0\.mlp\.gate_proj\.weight: 320 is no multiple of 128"
    with pytest.raises(CheckpointError, match=said):
        plan_quantization(Checkpoint.open(path))


def test_shapes_that_contradict_the_configuration_are_named(broken: Path) -> None:
    change_config(broken, lambda config: config | {"moe_intermediate_size": 512})
    with pytest.raises(
        CheckpointError, match=r"gate_proj\.weight has shape \[256, 128\], config\.json says \[512, 128\]"
    ):
        plan_quantization(Checkpoint.open(broken))


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    path = write_fp8_checkpoint(tmp_path / "dense", num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"no routed experts .* W4AFP8 is for MoE models"):
        plan_quantization(Checkpoint.open(path))


def test_a_quantized_checkpoint_is_not_quantized_again(w4afp8: Path) -> None:
    with pytest.raises(CheckpointError, match="int8 already; give the FP8 release it was made from"):
        plan_quantization(Checkpoint.open(w4afp8))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bf16_source_and_an_fp8_source_give_the_same_tensors(family: str, tmp_path: Path) -> None:
    results = []
    for fp8 in (False, True):
        plan = plan_quantization(Checkpoint.open(write_checkpoint(family, tmp_path / str(fp8), fp8=fp8)))
        outputs = list(planned_outputs(plan))
        assert plan.bytes_after == sum(output.nbytes for output in outputs)
        assert any(tensor.converted for tensor in plan.tensors) is not fp8
        results.append(sorted(outputs))
    assert results[0] == results[1]


def test_the_planned_tensors_are_the_written_tensors(fp8: Path, w4afp8: Path) -> None:
    written = {(t.name, t.dtype, t.shape) for t in Checkpoint.open(w4afp8).tensors.values()}
    planned = planned_outputs(plan_quantization(Checkpoint.open(fp8)))
    assert {(t.name, t.dtype, tuple(t.shape)) for t in planned} == written


def test_router_embeddings_norms_and_the_mtp_projection_are_never_converted(tmp_path: Path) -> None:
    path = write_checkpoint("deepseek_v3", tmp_path / "mtp", fp8=False, mtp=True)
    kept = {t.name for t in plan_quantization(Checkpoint.open(path)).tensors if t.action == "keep"}
    assert {"model.layers.1.mlp.gate.weight", "lm_head.weight", "model.layers.2.eh_proj.weight"} <= kept
    assert not any("_proj.weight" in name and "eh_proj" not in name for name in kept)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("model.layers.2.eh_proj.weight", "the scale of its block, or leave the MTP layer out"),
        ("lm_head.weight", "write it again in BF16, each value times the scale of its block$"),
    ],
)
def test_what_sglang_reads_unquantized_is_refused_in_fp8(name: str, remedy: str, tmp_path: Path) -> None:
    path = write_fp8_checkpoint(tmp_path / "mtp", mtp=True)
    with_fp8(path, name)
    said = rf"{name} is F8_E4M3, but SGLang reads it unquantized, without its scales: .*{remedy}"
    with pytest.raises(CheckpointError, match=said):
        plan_quantization(Checkpoint.open(path))


def test_missing_tensors_are_counted_and_named(fp8: Path) -> None:
    checkpoint = Checkpoint.open(fp8)
    del checkpoint.tensors["model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors that config\.json asks for: model\.norm\.weight;"):
        plan_quantization(checkpoint)


def test_fp8_of_another_format_is_told_from_an_incomplete_download(fp8: Path) -> None:
    checkpoint = Checkpoint.open(fp8)
    name = "model.layers.0.mlp.gate_proj.weight"
    checkpoint.tensors[f"{name}_scale"] = checkpoint.tensors.pop(f"{name}_scale_inv")
    with pytest.raises(CheckpointError, match=f"it has {name}_scale instead, of another format"):
        plan_quantization(checkpoint)


def with_fp8(path: Path, name: str) -> None:
    """Turn one tensor of a checkpoint into FP8 blocks."""
    tensors = {n: t for shard in path.glob("*.safetensors") for n, t in load_file(shard).items()}
    tensors[name], tensors[f"{name}_scale_inv"] = quantize_fp8_blocks(tensors[name])
    write_shards(path, tensors, 2)


def change_config(path: Path, change: Callable[[dict], dict]) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
