"""Decide, from headers alone, what becomes of every tensor, and which tensors the result holds.

Routed experts become int4. Every other linear is FP8 blocks in the result: those of an FP8 source stay byte for byte,
those of a BF16 source are converted, because SGLang's W4AFP8 reads no linear in BF16. All else is kept as it is.

    lightship plan demo/checkpoint
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from lightship.census import SCALE, Census, blocks_of, census
from lightship.checkpoint import EXPERT, Checkpoint
from lightship.errors import CheckpointError
from lightship.quant.degrees import degrees_of
from lightship.records import Action, Plan, PlannedTensor
from lightship.shards import BYTES_OF, TensorInfo
from lightship.w4afp8 import GROUP, tensor_parallel_degrees

FLOATS = ("BF16", "F16", "F32")
"""Dtypes of weights that are not quantized yet."""
INPUT_SCALES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
"""SGLang's names of an expert's projections, under which it looks for their input scales."""
NAMED = 5
"""So many of the missing tensors a message names."""


class PlannedOutput(NamedTuple):
    """A tensor of the result, exact in name, dtype (of safetensors), shape and bytes."""

    name: str
    dtype: str
    shape: list[int]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BYTES_OF[self.dtype]


def plan_quantization(checkpoint: Checkpoint) -> Plan:
    """Plan the quantization of a checkpoint with FP8 blocks, or of one in BF16.

    Raises:
        CheckpointError: the checkpoint has no routed experts or lacks other tensors that its architecture needs, they
            are quantized otherwise or where they must not be, or SGLang could serve the result at no degree of tensor
            parallelism.
    """
    sizes = checkpoint.dimensions
    layers = checkpoint.expert_layers()
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
    taken = census(checkpoint)
    for name, weight in taken.expected.items():
        if name in checkpoint.tensors:
            check = _check_linear if weight.linear else _check_unquantized
            check(checkpoint, checkpoint.tensors[name])
    _check_complete(checkpoint, taken)
    _check_servable(checkpoint, taken)
    return Plan(
        source=str(checkpoint.path),
        tensors=[_plan_tensor(checkpoint, taken, info) for info in checkpoint.tensors.values()],
        expert_layers=list(layers),
        tensor_parallel=tensor_parallel_degrees(sizes.moe_intermediate_size),
    )


def planned_outputs(plan: Plan) -> Iterator[PlannedOutput]:
    """Every tensor of the result, in the plan's order; an int4 weight comes with its scales right after it."""
    for tensor in plan.tensors:
        yield from _outputs_of(tensor)


def _outputs_of(tensor: PlannedTensor) -> list[PlannedOutput]:
    """What one tensor of the source becomes: itself, or a weight with its scales; nothing of an expert's old scales."""
    name, shape = tensor.name, tensor.shape
    if tensor.action == "int4":
        match = EXPERT.match(name)
        assert match
        if match["part"] != "weight":
            return []
        expert, projection = name.removesuffix(f"{match['projection']}.weight"), match["projection"]
        return [
            PlannedOutput(name, "I8", [shape[0], shape[1] // 2]),
            PlannedOutput(name + SCALE, "BF16", [shape[0], shape[1] // GROUP]),
            PlannedOutput(f"{expert}{INPUT_SCALES[projection]}.input_scale", "BF16", []),
        ]
    if tensor.converted:
        return [
            PlannedOutput(name, "F8_E4M3", shape),
            PlannedOutput(name + SCALE, "F32", list(blocks_of(tuple(shape)))),
        ]
    return [PlannedOutput(name, tensor.dtype, shape)]


def _check_unquantized(checkpoint: Checkpoint, info: TensorInfo) -> None:
    if info.dtype not in FLOATS:
        draft = ", or leave the MTP layer out (its tensors, and config.json's num_nextn_predict_layers)"
        raise CheckpointError(
            f"{checkpoint.path}: {info.name} is {info.dtype}, but SGLang reads it unquantized, without its scales: "
            "write it again in BF16, each value times the scale of its block"
            f"{draft if info.name.endswith('.eh_proj.weight') else ''}"
        )


def _check_linear(checkpoint: Checkpoint, info: TensorInfo) -> None:
    if info.dtype == "I8":
        raise CheckpointError(f"{checkpoint.path}: {info.name} is int8 already; give the FP8 release it was made from")
    if info.dtype not in ("F8_E4M3", *FLOATS):
        raise CheckpointError(
            f"{checkpoint.path}: {info.name} is {info.dtype}; lightship reads FP8 (F8_E4M3) blocks, BF16, F16 and F32"
        )
    if info.dtype == "F8_E4M3" and info.name + SCALE not in checkpoint.tensors:
        other = sorted(n for n in checkpoint.tensors if n.startswith(f"{info.name}_"))
        hint = f"it has {other[0]} instead, of another format" if other else "the checkpoint is incomplete"
        raise CheckpointError(
            f"{checkpoint.path} has no tensor {info.name}{SCALE}, the scales of its 128x128 FP8 blocks; {hint}: "
            "give a release in DeepSeek's FP8 blocks, or in BF16"
        )


def _check_complete(checkpoint: Checkpoint, taken: Census) -> None:
    if taken.missing:
        rest = len(taken.missing) - NAMED
        raise CheckpointError(
            f"{checkpoint.path} lacks {len(taken.missing)} tensors that config.json asks for: "
            f"{', '.join(taken.missing[:NAMED])}{f' and {rest} more' if rest > 0 else ''}; the checkpoint is "
            "incomplete, or its config.json is of another model: download both again"
        )
    for name, (shape, expected) in taken.misshapen.items():
        raise CheckpointError(f"{checkpoint.path}: {name} has shape {list(shape)}, config.json says {list(expected)}")


def _check_servable(checkpoint: Checkpoint, taken: Census) -> None:
    degrees = degrees_of(taken.expected.values())
    if not any(degree.possible for degree in degrees):
        alone = degrees[0].all_obstacles
        more = f" (and {len(alone) - 1} more)" if len(alone) > 1 else ""
        raise CheckpointError(
            f"{checkpoint.path}: SGLang refuses this model as W4AFP8 at every degree of tensor parallelism, because it "
            f"reads all linears as whole 128x128 FP8 blocks: {alone[0]}{more}. No recipe changes that: serve the "
            "source as it is, or quantize a model of other sizes"
        )


def _plan_tensor(checkpoint: Checkpoint, taken: Census, info: TensorInfo) -> PlannedTensor:
    weight = taken.expected.get(info.name.removesuffix(SCALE))
    linear = weight is not None and weight.linear
    action: Action = "keep"
    if EXPERT.match(info.name):
        action = "int4"
    elif linear or "F8_E4M3" in (info.dtype, _dtype(checkpoint, info.name.removesuffix(SCALE))):
        action = "fp8"
    planned = PlannedTensor(
        name=info.name,
        action=action,
        converted=action == "fp8" and linear and info.dtype in FLOATS and not info.name.endswith(SCALE),
        part=weight.part if weight else "unexpected",
        dtype=info.dtype,
        shape=list(info.shape),
        bytes_before=info.nbytes,
        bytes_after=info.nbytes,
    )
    if action == "int4" or planned.converted:
        return msgspec.structs.replace(planned, bytes_after=sum(output.nbytes for output in _outputs_of(planned)))
    return planned


def _dtype(checkpoint: Checkpoint, name: str) -> str | None:
    info = checkpoint.tensors.get(name)
    return info.dtype if info else None
