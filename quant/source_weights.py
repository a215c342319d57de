"""A weight of the FP8 or BF16 source as numbers, which is what a quantized one is held against.

read_source_weight(Checkpoint.open(path).reader(), "model.layers.1.mlp.experts.0.gate_proj.weight")
"""

import torch

from lightship.checkpoint import TensorReader
from lightship.errors import CheckpointError
from lightship.quant.loadable import FLOATS
from lightship.w4afp8 import GROUP, dequantize_fp8_blocks


def read_source_weight(reader: TensorReader, name: str, *rows: slice) -> torch.Tensor:
    """A weight of an FP8 block or floating-point source as float32 [out, in]; rows in whole blocks.

    Raises:
        CheckpointError: the source lacks it, or has it in another format.
    """
    original = reader.checkpoint
    info = original.info(name)
    if info.dtype in FLOATS:
        return reader.read(name, *rows).float()
    if info.dtype != "F8_E4M3":
        raise CheckpointError(f"{original.path}: {name} is {info.dtype}; --against takes the FP8 or BF16 source")
    blocks = [slice(r.start // GROUP, -(-r.stop // GROUP)) for r in rows]
    scale = original.info(f"{name}_scale_inv")
    if scale.shape != tuple(-(-n // GROUP) for n in info.shape):
        raise CheckpointError(
            f"{original.path}: {scale.name} has shape {list(scale.shape)}, not one for 128x128 blocks"
        )
    return dequantize_fp8_blocks(reader.read(name, *rows), reader.read(scale.name, *blocks))
