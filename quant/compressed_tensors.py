"""Write a finished W4AFP8 checkpoint again in the compressed-tensors format, which vLLM and transformers read.

A repack of one calibration's result: the int4 values, the FP8 values and the scales are those of the W4AFP8 directory,
bit for bit. What changes is names, packing and config.json:

    W4AFP8 (SGLang)                                      compressed-tensors
    …experts.E.P.weight            int8 [out, in / 2]    weight_packed   int32 [out, in / 8], group pack-quantized
    …experts.E.P.weight_scale_inv  [out, in / 128]       weight_scale    bf16, the same values
                                                         weight_shape    int64 [2]
    …experts.E.w1.input_scale      one value             none: activations get a scale a token at run time
    other linears, weight_scale_inv                      weight_scale, float32, group float-quantized (128 x 128)

One tensor at a time is in memory.

    lightship convert W4AFP8_DIR OUT --to compressed-tensors
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from lightship import __version__
from lightship.checkpoint import EXPERT, MANIFEST, Checkpoint, TensorReader
from lightship.errors import CheckpointError, LightshipError
from lightship.files import publish_directory
from lightship.manifest import describe_files, read_manifest, write_manifest
from lightship.quant.layout import SHARD_BYTES, Shards
from lightship.quant.plan import PlannedOutput
from lightship.shards import TensorInfo
from lightship.w4afp8 import GROUP

FORMAT = "compressed-tensors"
NOT_COPIED = {"config.json", "hf_quant_config.json"}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}


def convert(
    source: Path,
    out: Path,
    progress: Callable[[Iterable["Output"], str], Iterable["Output"]],
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write the W4AFP8 checkpoint `source` into the new directory `out` as compressed-tensors.

    Args:
        progress: wraps the tensors, to show how far it is.
        shard_bytes: a shard is closed before it would grow beyond this.

    Returns:
        Bytes of all tensors written.

    Raises:
        CheckpointError: `source` is not a finished W4AFP8 checkpoint; names the tensor that is not as the format asks.
        LightshipError: `out` exists.
    """
    if out.exists():
        raise LightshipError(f"{out} exists; remove it or name another directory")
    checkpoint = Checkpoint.open(source)
    method = (checkpoint.config.get("quantization_config") or {}).get("quant_method")
    if method != "w4afp8":
        raise CheckpointError(
            f"{source / 'config.json'}: quant_method is {method!r}, not 'w4afp8'; give what `lightship quantize` wrote"
        )
    if not (source / MANIFEST).is_file():
        raise CheckpointError(f"{source} has no {MANIFEST}, so it is not known to be complete; quantize again")
    _check_experts(checkpoint)
    outputs = [output for info in checkpoint.tensors.values() for output in _outputs_of(checkpoint, info)]
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        reader = checkpoint.reader()
        shards = Shards(partial, [output.tensor for output in outputs], shard_bytes)
        shards.reserve()
        for output in progress(outputs, f"writing {FORMAT}"):
            shards.write(output.tensor.name, output.value(reader))
        shards.write_index()
        shards.close()
        for companion in checkpoint.companions():
            if companion.name not in NOT_COPIED:
                shutil.copyfile(companion, partial / companion.name)
        config = dict(checkpoint.config, quantization_config=quantization_config(checkpoint))
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        manifest = read_manifest(source)
        write_manifest(
            partial,
            msgspec.structs.replace(manifest, format=FORMAT, lightship=__version__, files=describe_files(partial)),
        )
        publish_directory(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return sum(output.tensor.nbytes for output in outputs)


def quantization_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The block of config.json, as the compressed-tensors library, transformers, vLLM and SGLang read it.

    Three of its details are there for a reader that needs them. The format is pack-quantized and each group names its
    own, because SGLang takes int4 experts only under that format. The int4 group targets `Linear` too, because SGLang
    looks up its group size there. And no target of the FP8 group spells `experts`, because transformers takes the group
    that does for the routed experts'.
    """
    fp8 = [name.removesuffix(".weight") for name in checkpoint.tensors if f"{name}_scale_inv" in checkpoint.tensors]
    fp8 = [name for name in fp8 if not EXPERT.match(f"{name}.weight")]
    kept = [
        name.removesuffix(".weight")
        for name, info in checkpoint.tensors.items()
        if name.endswith(".weight") and len(info.shape) == 2 and info.dtype not in ("I8", "F8_E4M3")
    ]
    int4 = {
        "targets": [r"re:.*\.mlp\.experts\..*", "Linear"],
        "format": "pack-quantized",
        "weights": {
            "num_bits": 4,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": GROUP,
            "dynamic": False,
        },
        "input_activations": FLOAT8 | {"strategy": "token", "dynamic": True},
    }
    blocks = {
        "targets": _fp8_targets(fp8),
        "format": "float-quantized",
        "weights": FLOAT8 | {"strategy": "block", "block_structure": [GROUP, GROUP], "dynamic": False},
        "input_activations": FLOAT8 | {"strategy": "group", "group_size": GROUP, "dynamic": True},
    }
    return {
        "quant_method": FORMAT,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": blocks, "group_1": int4} if fp8 else {"group_0": int4},
        "ignore": _ignored(kept, fp8),
    }


def _within_layer(module: str) -> str | None:
    """`model.layers.3.self_attn.o_proj` -> `self_attn.o_proj`; None for a module outside the layers."""
    match = re.search(r"\.layers\.\d+\.(.+)$", module)
    return match[1] if match else None


def _fp8_targets(modules: list[str]) -> list[str]:
    """Patterns for the FP8 linears of every layer.

    An engine fuses projections under a name of its own (qkv_proj, gate_up_proj, fused_qkv_a_proj_with_mqa), so a
    pattern takes every projection of a block; what of it is not quantized stands in `ignore`.
    """
    targets = set()
    for module in modules:
        inner = _within_layer(module)
        if inner is None:
            targets.add(module)
            continue
        block, _, leaf = inner.rpartition(".")
        stem = re.escape(block).replace("experts", "expert.") + r"\." if block else ""
        targets.add(rf"re:.*\.{stem}{'[^.]*proj[^.]*' if block and 'proj' in leaf else re.escape(leaf)}$")
    return sorted(targets)


def _ignored(kept: list[str], fp8: list[str]) -> list[str]:
    """Names of the matrices that stay as they are; one pattern for all layers where no layer quantizes that module."""
    quantized = {_within_layer(module) for module in fp8}
    inner = {module: _within_layer(module) for module in kept}
    patterns = {
        module: rf"re:.*\.{re.escape(name)}$" for module, name in inner.items() if name and name not in quantized
    }
    return sorted({patterns.get(module, module) for module in kept})


@dataclass(frozen=True)
class Output:
    """A tensor to be written: what its header says, and how its value is found."""

    tensor: PlannedOutput
    value: Callable[[TensorReader], torch.Tensor]


def _check_experts(checkpoint: Checkpoint) -> None:
    """Raise a CheckpointError that names the first expert's weight that is missing, or says that there are none."""
    layers = checkpoint.expert_layers()
    if not layers:
        raise CheckpointError(f"{checkpoint.path} has no routed experts (…mlp.experts.N.gate_proj.weight) to convert")
    for layer_name in layers:
        for expert in range(checkpoint.dimensions.n_routed_experts):
            for projection in ("gate_proj", "up_proj", "down_proj"):
                checkpoint.info(f"{layer_name}.experts.{expert}.{projection}.weight")


def _outputs_of(checkpoint: Checkpoint, info: TensorInfo) -> list[Output]:
    """What becomes of one tensor of the W4AFP8 checkpoint: nothing, itself, or an expert's weight, scale and shape."""
    name = info.name
    if name.endswith(".input_scale"):
        return []
    match = EXPERT.match(name)
    if match and match["part"] == "weight":
        scale = checkpoint.info(f"{name}_scale_inv")
        groups = (info.shape[0], info.shape[1] * 2 // GROUP) if len(info.shape) == 2 else ()
        if info.dtype != "I8" or not groups or info.shape[1] * 2 % GROUP:
            raise _unexpected(checkpoint, info, f"I8 [out, in / 2] with whole groups of {GROUP}")
        if scale.dtype not in ("BF16", "F32") or scale.shape != groups:
            raise _unexpected(checkpoint, scale, f"BF16 or F32 {list(groups)}")
        out_features, in_features = info.shape[0], info.shape[1] * 2
        return [
            _output(f"{name}_packed", "I32", (out_features, in_features // 8), lambda r: pack_int32(r.read(name))),
            _output(f"{name}_scale", "BF16", scale.shape, lambda r: _bf16(r, scale.name)),
            _output(f"{name}_shape", "I64", (2,), lambda _: torch.tensor([out_features, in_features])),
        ]
    if name.endswith("_scale_inv"):
        weight = checkpoint.info(name.removesuffix("_scale_inv"))
        if match:
            return []
        blocks = tuple(-(-n // GROUP) for n in weight.shape)
        if weight.dtype != "F8_E4M3" or info.dtype != "F32" or info.shape != blocks:
            raise _unexpected(checkpoint, info, f"F32 {list(blocks)}, the scales of an F8_E4M3 weight")
        name = name.removesuffix("_inv")
    elif info.dtype == "F8_E4M3":
        checkpoint.info(f"{name}_scale_inv")
    return [_output(name, info.dtype, info.shape, lambda r: r.read_finite(info.name))]


def _output(name: str, dtype: str, shape: tuple[int, ...], value: Callable[[TensorReader], torch.Tensor]) -> Output:
    return Output(PlannedOutput(name, dtype, list(shape)), value)


def _unexpected(checkpoint: Checkpoint, info: TensorInfo, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.path / info.shard}: the tensor {info.name} is {info.dtype} {list(info.shape)}, W4AFP8 has "
        f"{expected} there; run `lightship verify {checkpoint.path}`"
    )


def pack_int32(packed: torch.Tensor) -> torch.Tensor:
    """int8 [out, in / 2], two's complement nibbles -> int32 [out, in / 8], nibbles offset by 8; the order is the same.

    Source: compressed_tensors.compressors.pack_quantized (0.20): value i of a row has bits 4i to 4i + 3.
    """
    return (packed.view(torch.uint8) ^ 0x88).view(torch.int32)


def _bf16(reader: TensorReader, name: str) -> torch.Tensor:
    """Group scales as SGLang's loader takes them: float32 on disk is rounded to bf16."""
    scale_OG = reader.read_finite(name).bfloat16()
    if not scale_OG.isfinite().all():
        raise CheckpointError(f"{reader.checkpoint.path}: the tensor {name} exceeds bf16's range; quantize again")
    return scale_OG
