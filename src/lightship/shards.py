"""One safetensors file, by its header: which tensors lie in it, where, with which dtype and shape."""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightship.errors import CheckpointError
from lightship.files import digest_of

if TYPE_CHECKING:
    import torch

BYTES_OF = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
BYTES_OF |= {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as its shard's header describes it; `dtype` is the safetensors name (F8_E4M3, BF16, …)."""

    name: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int
    """Of its first byte from the beginning of the file."""


def torch_dtype(name: str) -> "torch.dtype":
    """torch's dtype of a safetensors name (F8_E4M3, BF16, …).

    Raises:
        CheckpointError: it is not one that checkpoints of weights hold.
    """
    import torch

    dtypes = {
        "F64": torch.float64,
        "F32": torch.float32,
        "BF16": torch.bfloat16,
        "F16": torch.float16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
    if name not in dtypes:
        raise CheckpointError(f"the dtype {name} is not one of {', '.join(dtypes)}, which lightship reads")
    return dtypes[name]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The header of a safetensors file, by tensor name.

    Raises:
        CheckpointError: the file is not safetensors, or shorter than its header says (an interrupted download).
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise CheckpointError(f"{path} is not a safetensors file or is truncated in its header ({size} bytes)")
        try:
            header: Any = json.loads(file.read(length))
        except ValueError:
            raise CheckpointError(f"{path} is not a safetensors file: its header is not JSON") from None
        if not isinstance(header, dict):
            raise CheckpointError(f"{path} is not a safetensors file: its header is not a JSON object")
    header.pop("__metadata__", None)
    return {name: _described(path, name, entry, 8 + length, size) for name, entry in header.items()}


def _described(path: Path, name: str, entry: Any, data: int, size: int) -> TensorInfo:
    """One entry of a header; `data` is where the tensors begin in the file of `size` bytes."""
    try:
        begin, end = entry["data_offsets"]
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        width = BYTES_OF.get(dtype)
        sound = 0 <= begin <= end and (width is None or end - begin == math.prod(shape) * width)
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise CheckpointError(
            f"{path} is not a safetensors file: its header describes {name} as {entry}; download the shard again"
        )
    if data + end > size:
        raise CheckpointError(
            f"{path} is truncated: the tensor {name} ends at byte {data + end}, the file at {size}; "
            "download the shard again"
        )
    return TensorInfo(name, path.name, dtype, shape, end - begin, data + begin)


def digest_of_header(path: Path) -> str:
    """Changes with the file's size, its time of change, and its header; the weights are not read."""
    status = path.stat()
    with path.open("rb") as file:
        header = file.read(struct.unpack("<Q", file.read(8))[0])
    return digest_of([status.st_size, status.st_mtime_ns, header])
