"""Decide, from headers alone, what becomes of every tensor: int4 | fp8 | keep, and what it then weighs.

lightship plan demo/checkpoint
"""

from lightship.checkpoint import EXPERT, Checkpoint
from lightship.errors import CheckpointError
from lightship.records import Action, Plan, PlannedTensor
from lightship.shards import TensorInfo
from lightship.w4afp8 import GROUP, tensor_parallel_degrees

SCALE_BYTES = 2
"""Group scales and input scales are stored as bf16, which is all that the loader keeps of them."""


def plan_quantization(checkpoint: Checkpoint) -> Plan:
    """Plan the quantization of an FP8 block checkpoint.

    Raises:
        CheckpointError: the checkpoint has no routed experts, they are not FP8 blocks, some are missing, or their sizes
            are not whole groups of 128.
    """
    layers = checkpoint.expert_layers()
    sizes = checkpoint.dimensions
    if not layers:
        raise CheckpointError(
            f"{checkpoint.path} has no routed experts (…mlp.experts.N.gate_proj.weight): W4AFP8 is for MoE models"
        )
    for layer_name, found in layers.items():
        if found != sizes.n_routed_experts:
            raise CheckpointError(
                f"{checkpoint.path}: {layer_name} has {found} routed experts, config.json asks for "
                f"{sizes.n_routed_experts}; the checkpoint is incomplete: download it again"
            )
    for name, size in (("hidden_size", sizes.hidden_size), ("moe_intermediate_size", sizes.moe_intermediate_size)):
        if size % GROUP:
            raise CheckpointError(
                f"{checkpoint.path / 'config.json'}: {name} {size} is not a multiple of {GROUP}, W4AFP8's group size"
            )
    for layer_name in layers:
        for expert in range(sizes.n_routed_experts):
            for projection in ("gate_proj", "up_proj", "down_proj"):
                _check_expert_weight(checkpoint, f"{layer_name}.experts.{expert}.{projection}.weight")
    return Plan(
        source=str(checkpoint.path),
        tensors=[_plan_tensor(checkpoint, info) for info in checkpoint.tensors.values()],
        expert_layers=list(layers),
        tensor_parallel=tensor_parallel_degrees(sizes.moe_intermediate_size),
    )


def _check_expert_weight(checkpoint: Checkpoint, name: str) -> None:
    info = checkpoint.info(name)
    if info.dtype == "I8":
        raise CheckpointError(f"{checkpoint.path}: {name} is int8 already; give the FP8 release it was made from")
    if info.dtype != "F8_E4M3":
        raise CheckpointError(
            f"{checkpoint.path}: {name} is {info.dtype}; lightship reads FP8 (F8_E4M3) block checkpoints"
        )
    sizes = checkpoint.dimensions
    expected = (sizes.moe_intermediate_size, sizes.hidden_size)
    if name.endswith("down_proj.weight"):
        expected = expected[::-1]
    if info.shape != expected:
        raise CheckpointError(
            f"{checkpoint.path}: {name} has shape {list(info.shape)}, config.json says {list(expected)}"
        )
    scale = checkpoint.info(f"{name}_scale_inv")
    blocks = tuple(-(-n // GROUP) for n in expected)
    if scale.shape != blocks:
        raise CheckpointError(
            f"{checkpoint.path}: {scale.name} has shape {list(scale.shape)}, 128x128 blocks need {list(blocks)}"
        )


def _plan_tensor(checkpoint: Checkpoint, info: TensorInfo) -> PlannedTensor:
    action: Action = "keep"
    after = info.nbytes
    if match := EXPERT.match(info.name):
        action = "int4"
        weights = info.shape[0] * info.shape[1]
        after = weights // 2 + weights // GROUP * SCALE_BYTES + SCALE_BYTES if match["part"] == "weight" else 0
    elif info.dtype == "F8_E4M3" or (
        info.name.endswith("_scale_inv") and info.name.removesuffix("_scale_inv") in checkpoint.tensors
    ):
        action = "fp8"
    return PlannedTensor(
        name=info.name,
        action=action,
        dtype=info.dtype,
        shape=list(info.shape),
        bytes_before=info.nbytes,
        bytes_after=after,
    )
