"""Write the W4AFP8 checkpoint: int4 for the routed experts, everything else byte for byte from the source.

Tensors are streamed: an expert at a time is read and rounded, and a shard is written when it is full, so memory holds
one shard of the result. The directory appears under its name only when it is whole, manifest included.

    lightship quantize demo/checkpoint OUT --recipe recipes/demo.toml
"""

import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch

from lightship import __version__
from lightship.checkpoint import EXPERT, INDEX, Checkpoint, TensorReader
from lightship.errors import LightshipError
from lightship.files import publish_directory
from lightship.manifest import Manifest, describe_files, write_manifest
from lightship.quant.calibrate import HESSIANS
from lightship.quant.rounding import Rounding, rounding_for
from lightship.recipe import Quantization
from lightship.records import Calibration, LayerCalibration, Plan, Quantized
from lightship.w4afp8 import dequantize_fp8_blocks, pack_int4

SHARD_BYTES = 4_000_000_000
FORMAT = "w4afp8"
SGLANG_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
NOT_COPIED = {"config.json", INDEX, "hf_quant_config.json"}


def quantize(
    checkpoint: Checkpoint,
    plan: Plan,
    calibration: Calibration,
    calibration_dir: Path,
    settings: Quantization,
    out: Path,
    progress: Callable[[Iterable[str], str], Iterable[str]],
    shard_bytes: int = SHARD_BYTES,
) -> Quantized:
    """Quantize `checkpoint` into the new directory `out`.

    Args:
        calibration_dir: where `calibrate` left the Hessians.
        progress: wraps the names of the source's tensors, to show how far it is.
        shard_bytes: a shard is closed before it would grow beyond this.

    Raises:
        CheckpointError: a tensor holds NaN or infinity.
        LightshipError: `out` exists, or calibration lacks a layer.
    """
    if out.exists():
        raise LightshipError(f"{out} exists; remove it or name another directory")
    start = time.monotonic()
    layers, uncalibrated = _calibrated_layers(checkpoint, plan, calibration)
    starved = [
        f"{layer.layer_name}.experts.{expert}"
        for layer in calibration.layers
        for expert, tokens in enumerate(layer.tokens_of_experts())
        if not tokens
    ]
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        outputs = _outputs(checkpoint, plan, layers, calibration_dir, settings, progress)
        _write_shards(partial, outputs, shard_bytes)
        for companion in checkpoint.companions():
            if companion.name not in NOT_COPIED:
                shutil.copyfile(companion, partial / companion.name)
        config = dict(checkpoint.config, quantization_config=quantization_config())
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        manifest_digest = write_manifest(
            partial,
            Manifest(
                format=FORMAT,
                lightship=__version__,
                source_digest=checkpoint.digest,
                calibration_text_digest=calibration.text_digest,
                quantization=msgspec.to_builtins(settings),
                experts_without_tokens=starved,
                layers_without_calibration=uncalibrated,
                files=describe_files(partial),
            ),
        )
        publish_directory(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Quantized(
        path=str(out),
        method=settings.method,
        manifest_digest=manifest_digest,
        bytes_total=Checkpoint.open(out).nbytes,
        experts_without_tokens=starved,
        layers_without_calibration=uncalibrated,
        seconds=time.monotonic() - start,
    )


def quantization_config() -> dict[str, Any]:
    """The block of config.json. SGLang reads `quant_method` alone; the rest is for people and other loaders."""
    return {
        "quant_method": FORMAT,
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
        "moe_weight_bits": 4,
        "moe_group_size": 128,
        "moe_activation_scheme": "static",
    }


Output = tuple[str, torch.Tensor]


def _calibrated_layers(
    checkpoint: Checkpoint, plan: Plan, calibration: Calibration
) -> tuple[dict[str, LayerCalibration], list[str]]:
    """Each layer's calibration, and the names of the MTP layers, which borrow that of the last layer before them."""
    layers = {layer.layer_name: layer for layer in calibration.layers}
    uncalibrated = []
    for layer_name in plan.expert_layers:
        if layer_name in layers:
            continue
        if checkpoint.layer_number(layer_name) < checkpoint.dimensions.num_hidden_layers or not calibration.layers:
            raise LightshipError(
                f"the calibration lacks {layer_name}: it was made of another checkpoint; calibrate again"
            )
        layers[layer_name] = calibration.layers[-1]
        uncalibrated.append(layer_name)
    return layers, uncalibrated


def _outputs(
    checkpoint: Checkpoint,
    plan: Plan,
    layers: dict[str, LayerCalibration],
    calibration_dir: Path,
    settings: Quantization,
    progress: Callable[[Iterable[str], str], Iterable[str]],
) -> Iterator[Output]:
    """The tensors of the result, in the plan's order."""
    reader = checkpoint.reader()
    rounding = rounding_for(settings)
    hessians = _Hessians(calibration_dir / HESSIANS) if settings.method == "gptq" else None
    actions = {t.name: t.action for t in plan.tensors}
    for name in progress(actions, f"quantizing ({settings.method})"):
        if actions[name] != "int4":
            yield name, reader.read_finite(name)
            continue
        match = EXPERT.match(name)
        assert match
        if match["part"] == "weight":
            layer_name, projection = match["layer_name"], match["projection"]
            hessian = hessians.get(layer_name, match["expert"], projection) if hessians else None
            yield from _quantize_weight(reader, name, projection, layers[layer_name], rounding, hessian)


def _quantize_weight(
    reader: TensorReader,
    name: str,
    projection: str,
    layer: LayerCalibration,
    rounding: Rounding,
    hessian: torch.Tensor | None,
) -> Iterator[Output]:
    scale_name = f"{name}_scale_inv"
    w_OI = dequantize_fp8_blocks(reader.read_finite(name), reader.read_finite(scale_name))
    rounded = rounding(w_OI, hessian)
    yield name, pack_int4(rounded.q_OI)
    yield scale_name, rounded.scale_OG
    input_scale = layer.w2_input_scale if projection == "down_proj" else layer.w13_input_scale
    expert = name.removesuffix(f"{projection}.weight")
    yield f"{expert}{SGLANG_NAMES[projection]}.input_scale", torch.tensor(input_scale, dtype=torch.bfloat16)


class _Hessians:
    """The calibration's Hessians, read one at a time."""

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        if not path.is_file():
            raise LightshipError(f"{path} is missing; calibrate again")
        self._file = safe_open(path, framework="pt")
        self._names = set(self._file.keys())

    def get(self, layer_name: str, expert: str, projection: str) -> torch.Tensor | None:
        name = f"{layer_name}.{expert}.{'w2' if projection == 'down_proj' else 'w13'}"
        return self._file.get_tensor(name) if name in self._names else None


def _write_shards(path: Path, outputs: Iterable[Output], shard_bytes: int) -> None:
    """Write shards as they fill, then their index under the final names."""
    from safetensors.torch import save_file

    shards: list[dict[str, int]] = []
    pending: dict[str, torch.Tensor] = {}
    sizes: dict[str, int] = {}

    def flush() -> None:
        shard = path / f"shard-{len(shards)}"
        save_file(pending, shard, metadata={"format": "pt"})
        shard.chmod(0o644)  # safetensors makes it readable by its owner alone, and a server is often another user
        shards.append(dict(sizes))
        pending.clear()
        sizes.clear()

    filled = 0
    for name, tensor in outputs:
        size = tensor.numel() * tensor.element_size()
        if pending and filled + size > shard_bytes:
            flush()
            filled = 0
        pending[name], sizes[name] = tensor.contiguous(), size
        filled += size
    flush()
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards):
        final = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (path / f"shard-{number}").rename(path / final)
        weight_map |= dict.fromkeys(tensors, final)
    total = sum(sum(tensors.values()) for tensors in shards)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (path / INDEX).write_text(json.dumps(index, indent=2) + "\n")
