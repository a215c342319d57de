"""Read a W4AFP8 checkpoint as SGLang's loader would, and say all that is wrong with it.

SGLang takes a missing input scale for 1.0 and misaligned shards as they come, and serves nonsense without an error;
each of these is a check here.

    lightship verify OUT --source demo/checkpoint
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from lightship.checkpoint import EXPERT, Checkpoint, TensorReader
from lightship.errors import LightshipError
from lightship.manifest import check_files
from lightship.records import Check, LayerError, Verification
from lightship.w4afp8 import GROUP, dequantize_fp8_blocks, dequantize_int4, tensor_parallel_degrees

LARGEST_ERROR = 0.1
"""Of one tensor's reconstruction, relative and squared. Absmax/7 rounding of heavy-tailed weights costs about 0.03; a
tensor of zeros costs 1."""
NAMED = 3
"""Problems that a check names; it counts the others."""


def verify(path: Path, source: Path | None = None) -> Verification:
    """Verify the checkpoint directory `path`, against the `source` it was made from if given.

    Never raises for a fault of the checkpoint: every fault is a failed check that names the tensor or file.
    """
    checks: list[Check] = []
    try:
        checkpoint = Checkpoint.open(path)
        sizes = checkpoint.dimensions
    except LightshipError as error:
        return Verification(path=str(path), checks=[_check("opens", [str(error)], "")], layers=[])
    layers = list(checkpoint.expert_layers())
    reader = checkpoint.reader()
    checks.append(
        _check("opens", [], f"{len(checkpoint.tensors)} tensors in {len(checkpoint.shards)} files, all indexed")
    )
    checks.append(_check("manifest", _manifest_problems(path), "every file as it was written"))
    method = (checkpoint.config.get("quantization_config") or {}).get("quant_method")
    checks.append(
        _check(
            "config", [] if method == "w4afp8" else [f"quant_method is {method!r}, not 'w4afp8'"], "quant_method w4afp8"
        )
    )
    experts = [f"{layer}.experts.{e}" for layer in layers for e in range(sizes.n_routed_experts)]
    layout = list(_layout_problems(checkpoint, experts))
    if not layers:
        layout.append("no routed experts at all")
    checks.append(_check("layout", layout, f"{len(experts)} experts: names, dtypes and shapes"))
    checks.append(_check("finite", list(_not_finite(checkpoint, reader)), "no NaN, no infinity"))
    if not layout:
        checks.append(
            _check(
                "input scales",
                list(_scale_problems(reader, layers, sizes.n_routed_experts)),
                "one w1/w3, one w2 a layer",
            )
        )
    possible = tensor_parallel_degrees(sizes.moe_intermediate_size)
    checks.append(
        _check("tensor parallel", [] if possible else ["moe_intermediate_size is no multiple of 128"], f"TP {possible}")
    )
    errors: list[LayerError] = []
    if source and not layout:
        original = Checkpoint.open(source)
        checks.append(
            _check("untouched", list(_changed(checkpoint, original)), "all else is the source's, bit for bit")
        )
        tensors = {layer: _tensor_errors(reader, original.reader(), layer, sizes.n_routed_experts) for layer in layers}
        errors = [_layer_error(layer, of_layer) for layer, of_layer in tensors.items()]
        found = {name: wrong / total for of_layer in tensors.values() for name, (wrong, total) in of_layer.items()}
        far = [f"{name}: {error:.3g} > {LARGEST_ERROR}" for name, error in found.items() if not error <= LARGEST_ERROR]
        checks.append(
            _check("reconstruction", far, f"relative squared error of a tensor at most {max(found.values()):.4f}")
        )
    return Verification(path=str(path), checks=checks, layers=errors)


def _check(name: str, problems: list[str], fine: str) -> Check:
    more = f" and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
    return Check(name=name, passed=not problems, detail="; ".join(problems[:NAMED]) + more if problems else fine)


def _manifest_problems(path: Path) -> list[str]:
    try:
        check_files(path)
    except LightshipError as error:
        return [str(error)]
    return []


def _layout_problems(checkpoint: Checkpoint, experts: list[str]) -> Iterator[str]:
    sizes = checkpoint.dimensions
    hidden, intermediate = sizes.hidden_size, sizes.moe_intermediate_size
    for expert in experts:
        for projection, rows, columns in (
            ("gate_proj", intermediate, hidden),
            ("up_proj", intermediate, hidden),
            ("down_proj", hidden, intermediate),
        ):
            weight = f"{expert}.{projection}.weight"
            yield from _tensor_problems(checkpoint, weight, ("I8",), (rows, columns // 2))
            yield from _tensor_problems(checkpoint, f"{weight}_scale_inv", ("BF16", "F32"), (rows, columns // GROUP))
        for w in ("w1", "w2", "w3"):
            yield from _tensor_problems(checkpoint, f"{expert}.{w}.input_scale", ("BF16", "F32"), ())


def _tensor_problems(
    checkpoint: Checkpoint, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...]
) -> Iterator[str]:
    if name not in checkpoint.tensors:
        yield f"{name} is missing"
        return
    info = checkpoint.tensors[name]
    if info.dtype not in dtypes:
        yield f"{name} is {info.dtype}, not {' or '.join(dtypes)}"
    if info.shape != shape and not (shape == () and info.shape == (1,)):
        yield f"{name} has shape {list(info.shape)}, not {list(shape)}"


def _not_finite(checkpoint: Checkpoint, reader: TensorReader) -> Iterator[str]:
    for name in checkpoint.tensors:
        try:
            reader.read_finite(name)
        except LightshipError as error:
            yield str(error)


def _scale_problems(reader: TensorReader, layers: list[str], experts: int) -> Iterator[str]:
    for layer in layers:
        first: dict[str, float] = {}
        for expert in range(experts):
            for w, shares in (("w1", "w1"), ("w3", "w1"), ("w2", "w2")):
                name = f"{layer}.experts.{expert}.{w}.input_scale"
                value = float(reader.read(name))
                if not value > 0:
                    yield f"{name} is {value}, not positive"
                elif value != float(torch.tensor(value).bfloat16()):
                    yield f"{name} is {value}, which bf16 cannot hold"
                elif value != first.setdefault(shares, value):
                    yield f"{name} is {value}, the layer's first is {first[shares]}: TP and EP would differ"


def _changed(checkpoint: Checkpoint, original: Checkpoint) -> Iterator[str]:
    reader, original_reader = checkpoint.reader(), original.reader()
    for name in original.tensors:
        if EXPERT.match(name):
            continue
        if name not in checkpoint.tensors:
            yield f"{name} of the source is missing"
        elif not _same_bytes(reader.read(name), original_reader.read(name)):
            yield f"{name} differs from the source"


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _tensor_errors(
    reader: TensorReader, original: TensorReader, layer: str, experts: int
) -> dict[str, tuple[float, float]]:
    """Of each expert weight of a layer: (||w - w'||², ||w||²)."""
    errors = {}
    for expert in range(experts):
        for projection in ("gate_proj", "up_proj", "down_proj"):
            name = f"{layer}.experts.{expert}.{projection}.weight"
            w_OI = dequantize_fp8_blocks(original.read(name), original.read(f"{name}_scale_inv"))
            restored_OI = dequantize_int4(reader.read(name), reader.read(f"{name}_scale_inv"))
            total = float(w_OI.square().sum())
            errors[name] = (float((w_OI - restored_OI).square().sum()), max(total, 1e-30))
    return errors


def _layer_error(layer: str, tensors: dict[str, tuple[float, float]]) -> LayerError:
    def error(*, down: bool) -> float:
        chosen = [pair for name, pair in tensors.items() if ("down_proj" in name) == down]
        return sum(wrong for wrong, _ in chosen) / sum(total for _, total in chosen)

    return LayerError(layer_name=layer, w13=error(down=False), w2=error(down=True))
