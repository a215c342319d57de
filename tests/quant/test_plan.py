"""The plan says from headers alone what the quantized checkpoint will weigh."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lightship.checkpoint import Checkpoint
from lightship.errors import CheckpointError
from lightship.quant.plan import plan_quantization
from tests.tiny import write_fp8_checkpoint


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


def change_config(path: Path, change: Callable[[dict], dict]) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
