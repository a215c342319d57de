"""What the headers and the configuration alone say about a W4AFP8 checkpoint: would SGLang load each tensor as meant?

Reads no weights, so it is done in seconds on a checkpoint of any size. Rules: SGLang 0.5.23's loader.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightship.checkpoint import EXPERT, Checkpoint
from lightship.quant.degrees import degrees_of
from lightship.quant.findings import Findings
from lightship.quant.mispacking import shapes_that_fit
from lightship.records import Check, Degree
from lightship.shards import TensorInfo
from lightship.w4afp8 import GROUP

INPUT_SCALES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
"""SGLang's names in `input_scale`."""
HF_QUANT_CONFIG = "hf_quant_config.json"
EXPECTED_DEGREE = 8
"""Eight GPUs a node is what W4AFP8 is for: one node of H100 or H200."""
SCALE_DTYPES = ("BF16", "F32")
FLOATS = ("BF16", "F16", "F32")
LINEAR = re.compile(
    r"(?!.*(vision|visual)).*\.layers\.\d+\.(?!eh_proj|.*\bweights_proj)(.*_proj|.*kv_a_proj_with_mqa|.*indexer\.(wq_b|wk))\.weight$"
)
"""Linears other than the experts that SGLang builds with its FP8 method: all of a layer's, without the MTP layer's
`eh_proj` and the indexer's `weights_proj`."""
NEVER_QUANTIZED = re.compile(r".*(\.mlp\.gate|norm|embed_tokens|lm_head|\bhead|\.eh_proj)\.weight$")


def setting(config: dict[str, Any], name: str) -> Any:
    """A value of config.json, or of the text model's part of it in a multimodal one; None if neither has it."""
    text = config.get("text_config")
    return config.get(name, text.get(name) if isinstance(text, dict) else None)


def expert_weights(checkpoint: Checkpoint, layer: str) -> Iterator[tuple[str, int, int]]:
    """Each weight that a layer's routed experts need: its name, output and input features."""
    sizes = checkpoint.dimensions
    hidden, intermediate = sizes.hidden_size, sizes.moe_intermediate_size
    for expert in range(sizes.n_routed_experts):
        yield f"{layer}.experts.{expert}.gate_proj.weight", intermediate, hidden
        yield f"{layer}.experts.{expert}.up_proj.weight", intermediate, hidden
        yield f"{layer}.experts.{expert}.down_proj.weight", hidden, intermediate


def check_config(checkpoint: Checkpoint) -> Check:
    """The quantization block that makes SGLang choose W4AFP8: in config.json, or in hf_quant_config.json alone."""
    found = Findings("config")
    block = setting(checkpoint.config, "quantization_config")
    file = checkpoint.path / HF_QUANT_CONFIG
    algorithm = _algorithm(file, found) if file.is_file() else None
    fine = "quantization_config: quant_method w4afp8"
    if block is None:
        fine = f"{HF_QUANT_CONFIG}: MIXED_PRECISION, and no block in config.json"
        if not file.is_file():
            found.fail(
                f"config.json has no quantization_config and there is no {HF_QUANT_CONFIG}: SGLang takes the "
                "checkpoint for unquantized; add a block with quant_method w4afp8"
            )
    else:
        method = block.get("quant_method") if isinstance(block, dict) else block
        if method != "w4afp8":
            found.fail(
                f"quant_method is {method!r}, not 'w4afp8': SGLang believes this block of config.json, which is "
                "probably the source's; replace it"
            )
        elif isinstance(block, dict):
            for key in ("moe_group_size", "group_size", "weight_block_size"):
                value = block.get(key, GROUP)
                if value not in (GROUP, [GROUP, GROUP]):
                    found.warn(f"{key} {value} in config.json is ignored: SGLang's groups and blocks are {GROUP}")
    if algorithm not in (None, "MIXED_PRECISION"):
        found.fail(f"{HF_QUANT_CONFIG} says quant_algo {algorithm!r}, W4AFP8 is 'MIXED_PRECISION': remove the file")
    return found.check(fine)


def _algorithm(file: Path, found: Findings) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))["quantization"]["quant_algo"]
    except (ValueError, KeyError, TypeError) as error:
        found.fail(f"{file.name} cannot be read as JSON with quantization.quant_algo: {error!r}")
        return None


def check_experts(checkpoint: Checkpoint) -> Check:
    """Names, dtypes and shapes of every routed expert's weights and group scales."""
    found = Findings("experts")
    layers = checkpoint.expert_layers()
    count = checkpoint.dimensions.n_routed_experts
    if not layers:
        packed = any(name.endswith("weight_packed") for name in checkpoint.tensors)
        other = ": it is compressed-tensors' pack-quantized format, not W4AFP8" if packed else ""
        found.fail(f"no routed experts at all (…mlp.experts.N.gate_proj.weight){other}")
    for key in ("hidden_size", "moe_intermediate_size"):
        if getattr(checkpoint.dimensions, key) % GROUP:
            found.fail(f"{key} {getattr(checkpoint.dimensions, key)} is no multiple of {GROUP}, the group size")
    for missing in _missing_layers(checkpoint, layers):
        found.fail(f"layer {missing} has no routed experts")
    for layer, present in layers.items():
        if present > count:
            found.fail(f"{layer} has {present} routed experts, config.json says {count}")
        if _is_mtp(checkpoint, layer) and not _is_int4(checkpoint, layer):
            continue  # check_mtp says it once
        for weight, rows, columns in expert_weights(checkpoint, layer):
            _check_tensor(checkpoint, found, weight, ("I8",), (rows, columns // 2))
            _check_tensor(checkpoint, found, f"{weight}_scale_inv", SCALE_DTYPES, (rows, columns // GROUP))
    return found.check(
        f"{count * len(layers):,} ({count} in each of {len(layers)} layers): names, dtypes, shapes as SGLang reads them"
    )


def _missing_layers(checkpoint: Checkpoint, layers: dict[str, int]) -> list[int]:
    """Numbers of the layers that lack routed experts, if the configuration puts them in every layer from one on."""
    if any(setting(checkpoint.config, key) not in (None, 1) for key in ("moe_layer_freq", "decoder_sparse_step")):
        return []
    numbers = {checkpoint.layer_number(layer) for layer in layers}
    if not numbers:
        return []
    first = setting(checkpoint.config, "first_k_dense_replace")
    expected = range(min(numbers) if first is None else first, checkpoint.dimensions.num_hidden_layers)
    return sorted(set(expected) - numbers - set(setting(checkpoint.config, "mlp_only_layers") or []))


def _check_tensor(
    checkpoint: Checkpoint, found: Findings, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...]
) -> None:
    info = checkpoint.tensors.get(name)
    if info is None:
        found.fail(f"{name} is missing")
        return
    if info.dtype not in dtypes:
        hint = ": eight int4 in an int32, which is another format" if info.dtype == "I32" else ""
        found.fail(f"{name} is {info.dtype}, not {' or '.join(dtypes)}{hint}")
    elif info.shape != shape:
        found.fail(f"{name} has shape {list(info.shape)}, not {list(shape)}{_explain(info, shape)}")


def _explain(info: TensorInfo, shape: tuple[int, ...]) -> str:
    rows, columns = shape
    if info.name.endswith(".weight"):
        fits = shapes_that_fit(info.shape, rows, columns * 2)
        return f": {', or '.join(fits)}" if fits else ""
    if info.shape == shape[::-1]:
        return ": the scales are transposed"
    inputs = columns * GROUP
    if len(info.shape) == 2 and info.shape[0] == rows and info.shape[1] and inputs % info.shape[1] == 0:
        return f": one scale for {inputs // info.shape[1]} inputs, SGLang's group is {GROUP}"
    return ""


def check_mtp(checkpoint: Checkpoint) -> Check:
    """The multi-token-prediction layers: there as config.json says, and their experts int4 like all others."""
    found = Findings("MTP layer")
    asked = int(setting(checkpoint.config, "num_nextn_predict_layers") or 0)
    first = checkpoint.dimensions.num_hidden_layers
    stems = (re.match(r"(.*\.layers\.)(\d+)\.", name) for name in checkpoint.tensors)
    present = {int(m[2]): m[0].removesuffix(".") for m in stems if m and int(m[2]) >= first}
    for number in range(first, first + asked):
        if number not in present:
            found.fail(
                f"config.json asks for {asked} MTP layer, but layer {number} is not there: set "
                "num_nextn_predict_layers to 0, or quantize with the layer"
            )
            continue
        lacking = [
            n for n in ("eh_proj", "enorm", "hnorm") if f"{present[number]}.{n}.weight" not in checkpoint.tensors
        ]
        if lacking:
            found.fail(f"{present[number]} lacks {', '.join(lacking)}")
    for number in sorted(set(present) - set(range(first, first + asked))):
        found.fail(
            f"{present[number]} is beyond the model's {first} layers, and config.json asks for {asked} MTP layers: "
            "correct num_nextn_predict_layers, or leave the layer out"
        )
    for layer in checkpoint.expert_layers():
        if _is_mtp(checkpoint, layer) and not _is_int4(checkpoint, layer):
            dtypes = {
                checkpoint.tensors[name].dtype
                for name, _, _ in expert_weights(checkpoint, layer)
                if name in checkpoint.tensors
            }
            found.fail(f"{layer}'s experts are {', '.join(sorted(dtypes))}: SGLang loads every layer's experts as int4")
    return found.check(f"{asked} asked for, {asked} there, experts int4" if asked else "none, and none asked for")


def _is_mtp(checkpoint: Checkpoint, layer: str) -> bool:
    return checkpoint.layer_number(layer) >= checkpoint.dimensions.num_hidden_layers


def _is_int4(checkpoint: Checkpoint, layer: str) -> bool:
    """Whether any of the layer's expert weights is int8; the others are then each a fault of their own."""
    names = (name for name, _, _ in expert_weights(checkpoint, layer))
    return any(checkpoint.tensors[name].dtype == "I8" for name in names if name in checkpoint.tensors)


def check_tensor_parallel(checkpoint: Checkpoint) -> Check:
    """The degrees at which every rank's part is whole groups of the experts, and whole blocks of the other linears."""
    found = Findings("tensor parallel")
    degrees = degrees_of(checkpoint.architecture.weights(checkpoint.config).values())
    table = ", ".join(f"TP {degree.tp} {'yes' if degree.possible else 'NO'}" for degree in degrees)
    expected = next(degree for degree in degrees if degree.tp == EXPECTED_DEGREE)
    if not any(degree.possible for degree in degrees):
        found.fail(f"no degree works: {'; '.join(_obstacles(degrees[0]))}")
    elif not expected.possible:
        found.warn(f"{table}; at TP {EXPECTED_DEGREE}: {'; '.join(_obstacles(expected))}")
    return found.check(table)


def _obstacles(degree: Degree) -> Iterator[str]:
    """The first of each part, with what SGLang makes of it."""
    for part, obstacles in degree.obstacles.items():
        if obstacles:
            served = "the scales misalign without an error" if part == "routed experts" else "SGLang refuses it"
            yield f"{obstacles[0]} ({served})"


def check_linears(checkpoint: Checkpoint) -> Check:
    """Every linear but the routed experts: FP8 e4m3 with a scale for each 128x128 block; the rest is not quantized."""
    found = Findings("other linears")
    linears = 0
    for name, info in checkpoint.tensors.items():
        if EXPERT.match(name) or not name.endswith(".weight") or len(info.shape) < 1:
            continue
        if NEVER_QUANTIZED.match(name):
            if info.dtype not in FLOATS:
                found.fail(
                    f"{name} is {info.dtype}: SGLang reads it unquantized, without its scales; write it again in BF16, "
                    "each value times the scale of its block"
                )
        elif LINEAR.match(name) or info.dtype.startswith("F8_"):
            linears += 1
            _check_linear(checkpoint, found, info)
    return found.check(f"{linears:,} in FP8 e4m3 with 128x128 block scales")


def _check_linear(checkpoint: Checkpoint, found: Findings, info: TensorInfo) -> None:
    scale = checkpoint.tensors.get(f"{info.name}_scale_inv")
    if info.dtype != "F8_E4M3":
        found.fail(f"{info.name} is {info.dtype}: SGLang reads every linear but the experts as F8_E4M3 blocks")
    elif scale is None:
        other = "; its weight_scale is not what SGLang reads" if f"{info.name}_scale" in checkpoint.tensors else ""
        found.fail(f"{info.name}_scale_inv is missing{other}")
    elif scale.dtype not in SCALE_DTYPES:
        found.fail(f"{scale.name} is {scale.dtype}, not F32")
    else:
        blocks = tuple(-(-n // GROUP) for n in info.shape)
        if scale.shape != blocks:
            hint = ": transposed" if scale.shape == blocks[::-1] else ""
            found.fail(f"{scale.name} has shape {list(scale.shape)}, 128x128 blocks need {list(blocks)}{hint}")
