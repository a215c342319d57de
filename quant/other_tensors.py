"""Every tensor but the experts': finite, and the source's, byte for byte or as FP8 blocks of its BF16 weight."""

from collections.abc import Iterator

import torch

from lightship.checkpoint import EXPERT, Checkpoint
from lightship.progress import tracked
from lightship.quant.expert_weights import count_not_finite, row_blocks
from lightship.quant.findings import Findings
from lightship.quant.loadable import FLOATS
from lightship.quant.source_weights import read_source_weight
from lightship.records import Check
from lightship.w4afp8 import GROUP, dequantize_fp8_blocks

LARGEST_FP8_ERROR = 0.005
"""Of a linear that a BF16 source's conversion to FP8 blocks has rounded; e4m3 costs about 0.0007."""


def check_others(checkpoint: Checkpoint, original: Checkpoint | None, finite: Findings) -> Check | None:
    """Read every tensor that is not an expert's; with a source, compare: the same bytes, or FP8 blocks of its BF16."""
    untouched = Findings("untouched")
    reader, original_reader = checkpoint.reader(), original.reader() if original else None
    names = [n for n in checkpoint.tensors if not EXPERT.match(n) and not n.endswith(".input_scale")]
    for name in tracked(names, "other tensors"):
        bad, same, wrong, total = 0, True, 0.0, 0.0
        mode = _comparison(checkpoint, original, name, untouched)
        for rows in row_blocks(checkpoint.tensors[name].shape):
            part = reader.read(name, *rows)
            bad += count_not_finite(part)
            if mode == "bytes" and original_reader is not None:
                same = same and _same_bytes(part, original_reader.read(name, *rows))
            elif mode == "rounded" and original_reader is not None:
                w_OI = read_source_weight(original_reader, name, *rows)
                blocks = [slice(r.start // GROUP, -(-r.stop // GROUP)) for r in rows]
                restored_OI = dequantize_fp8_blocks(part, reader.read(f"{name}_scale_inv", *blocks))
                wrong += float((w_OI - restored_OI).square().sum())
                total += float(w_OI.square().sum())
        if bad:
            finite.fail(f"{name} has {bad:,} values that are NaN or infinite")
        if not same:
            untouched.fail(f"{name} differs from the source")
        error = wrong / max(total, 1e-30)
        if not error <= LARGEST_FP8_ERROR:
            untouched.fail(f"{name}: its FP8 blocks are {error:.3g} > {LARGEST_FP8_ERROR} from the source's weight")
    if original is None:
        return None
    for name in _lost(checkpoint, original):
        untouched.fail(f"{name} of the source is missing")
    return untouched.check("all but the experts is the source's")


def _comparison(checkpoint: Checkpoint, original: Checkpoint | None, name: str, untouched: Findings) -> str:
    """How a tensor is compared: `bytes`, `rounded` (FP8 blocks of a float source) or not at all."""
    if original is None:
        return ""
    info = checkpoint.tensors[name]
    if name not in original.tensors:
        if not (name.endswith("_scale_inv") and name.removesuffix("_scale_inv") in original.tensors):
            untouched.warn(f"{name} is not in the source")
        return ""
    theirs = original.tensors[name]
    if info.shape != theirs.shape:
        untouched.fail(f"{name} has shape {list(info.shape)}, the source's {list(theirs.shape)}")
        return ""
    if info.dtype == "F8_E4M3" and theirs.dtype in FLOATS:
        scale = checkpoint.tensors.get(f"{name}_scale_inv")
        return "rounded" if scale and scale.shape == tuple(-(-n // GROUP) for n in info.shape) else ""
    if info.dtype != theirs.dtype:
        untouched.fail(f"{name} is {info.dtype}, the source's {theirs.dtype}")
        return ""
    return "bytes"


def _lost(checkpoint: Checkpoint, original: Checkpoint) -> Iterator[str]:
    """Names of the source that the checkpoint lacks, but for the experts' and those of an MTP layer left out whole."""
    present = {_layer_number(name) for name in checkpoint.tensors}
    for name in original.tensors:
        number = _layer_number(name)
        left_out = number is not None and number >= checkpoint.dimensions.num_hidden_layers and number not in present
        if name not in checkpoint.tensors and not EXPERT.match(name) and not left_out:
            yield name


def _layer_number(name: str) -> int | None:
    return Checkpoint.layer_number(name) if ".layers." in name else None


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
