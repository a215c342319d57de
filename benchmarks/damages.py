"""Ways to damage a W4AFP8 checkpoint that load without an error and serve another model; see damaged.py."""

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch
from safetensors.torch import load_file, save_file

from lightship.checkpoint import MANIFEST, Checkpoint, TensorReader
from lightship.manifest import describe_files, read_manifest, write_manifest
from lightship.quant.rounding import round_with_scales
from lightship.quant.source_weights import read_source_weight
from lightship.w4afp8 import GROUP, INT4_MAX, LEAST_AMAX, pack_int4

COARSE = 512
Tensors = dict[str, torch.Tensor]


def permute_experts(tensors: Tensors, source: TensorReader) -> None:
    """Give each expert of the first layer its neighbour's weights and scales; the router stays."""
    stem = f"{_first_layer(source)}.experts."
    count = source.checkpoint.dimensions.n_routed_experts
    before = {name: tensor for name, tensor in tensors.items() if name.startswith(stem)}
    for name, tensor in before.items():
        number, _, rest = name.removeprefix(stem).partition(".")
        tensors[f"{stem}{(int(number) + 1) % count}.{rest}"] = tensor


def reset_input_scales(tensors: Tensors, source: TensorReader) -> None:
    """Leave every input scale of the first layer at SGLang's placeholder."""
    for name, tensor in tensors.items():
        if name.startswith(_first_layer(source)) and name.endswith(".input_scale"):
            tensor.fill_(1.0)


def reset_group_scales(tensors: Tensors, source: TensorReader) -> None:
    """Set every group scale of the first layer's experts to 1.0."""
    for name, tensor in tensors.items():
        if name.startswith(f"{_first_layer(source)}.experts.") and name.endswith("_scale_inv"):
            tensor.fill_(1.0)


def coarsen_groups(tensors: Tensors, source: TensorReader) -> None:
    """Round all experts by absmax in groups of 512 inputs, each stored as groups of 128 with the same scale."""
    for name in [n for n in tensors if tensors[n].dtype == torch.int8]:
        w_OI = read_source_weight(source, name)
        scale_OG = torch.cat(
            [
                (part_OI.abs().amax(dim=1, keepdim=True).clamp_min(LEAST_AMAX) / INT4_MAX)
                .bfloat16()
                .expand(-1, part_OI.shape[1] // GROUP)
                for part_OI in w_OI.split(COARSE, dim=1)
            ],
            dim=1,
        ).contiguous()
        tensors[name] = pack_int4(round_with_scales(w_OI, scale_OG).q_OI)
        tensors[f"{name}_scale_inv"] = scale_OG


def _first_layer(source: TensorReader) -> str:
    return next(iter(source.checkpoint.expert_layers()))


Damage = Callable[[Tensors, TensorReader], None]
DAMAGES: dict[str, Damage] = {
    "one layer's experts permuted": permute_experts,
    "one layer's input scales at 1.0": reset_input_scales,
    "one layer's group scales at 1.0": reset_group_scales,
    "absmax at group 512": coarsen_groups,
}


def damage_checkpoint(sound: Path, source: Path, out: Path, damage: Damage) -> Path:
    """Copy the checkpoint `sound`, damage the copy, and make its manifest fit; returns `out`."""
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(sound, partial)
    (shard,) = partial.glob("*.safetensors")  # the embedded model's result is one
    tensors: Tensors = load_file(shard)
    damage(tensors, Checkpoint.open(source).reader())
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, shard, metadata={"format": "pt"})
    manifest = read_manifest(partial)
    (partial / MANIFEST).unlink()
    write_manifest(partial, msgspec.structs.replace(manifest, files=describe_files(partial)))
    return partial.rename(out)
