"""A checkpoint directory, opened by its headers: which tensor lies in which shard, with which dtype and shape.

Opening reads a few kilobytes a shard and checks what can be checked without the data: every shard of the index is there
and as long as its header says, and index and shards name the same tensors.
"""

import json
import re
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightship.errors import CheckpointError
from lightship.files import digest_of, digest_of_file

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MANIFEST = "lightship.json"
"""Written by lightship beside the weights; see `lightship.manifest`."""
BYTES_OF = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I8": 1, "U8": 1}

EXPERT = re.compile(
    r"(?P<layer_name>.*\.layers\.\d+\.mlp)\.experts\.(?P<expert>\d+)\."
    r"(?P<projection>gate_proj|up_proj|down_proj)\.(?P<part>weight|weight_scale_inv)$"
)
"""Names of the routed experts' tensors, as DeepSeek, Kimi and their relatives release them."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as its shard's header describes it; `dtype` is the safetensors name (F8_E4M3, BF16, …)."""

    name: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class ExpertDimensions:
    """Sizes of the routed experts, from config.json."""

    hidden_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_hidden_layers: int


class Checkpoint:
    """A directory with config.json, safetensors shards and, if there are several, their index."""

    def __init__(self, path: Path, config: dict[str, Any], tensors: dict[str, TensorInfo]) -> None:
        self.path = path
        self.config = config
        self.tensors = tensors

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Read config, index and headers.

        Raises:
            CheckpointError: names the file or tensor that is missing, truncated, unreadable or not indexed.
        """
        config_file = path / "config.json"
        if not config_file.is_file():
            raise CheckpointError(f"{path} is not a checkpoint: it has no config.json; give the directory of a release")
        config = _json(config_file)
        index_file = path / INDEX
        if index_file.is_file():
            weight_map = _json(index_file).get("weight_map")
            if not isinstance(weight_map, dict):
                raise CheckpointError(f"{index_file} has no weight_map; download it again")
        elif (path / SINGLE).is_file():
            weight_map = dict.fromkeys(read_header(path / SINGLE), SINGLE)
        else:
            raise CheckpointError(f"{path} has neither {INDEX} nor {SINGLE}; download the weights again")
        tensors: dict[str, TensorInfo] = {}
        for shard in sorted(set(weight_map.values())):
            if not (path / shard).is_file():
                missing = sum(where == shard for where in weight_map.values())
                raise CheckpointError(
                    f"{path / shard} is missing; {INDEX} places {missing} tensors in it; download it again"
                )
            for name, info in read_header(path / shard).items():
                if weight_map.get(name) != shard:
                    raise CheckpointError(
                        f"{path / shard} holds the tensor {name}, which {INDEX} does not place there; "
                        "the index is incomplete or of another release: download it again"
                    )
                tensors[name] = info
        absent = sorted(set(weight_map) - set(tensors))
        if absent:
            raise CheckpointError(
                f"{path / weight_map[absent[0]]} lacks the tensor {absent[0]} that {INDEX} places in it "
                f"({len(absent)} tensors are lacking); download the shard again"
            )
        return cls(path, config, tensors)

    @property
    def shards(self) -> list[str]:
        return sorted({info.shard for info in self.tensors.values()})

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @cached_property
    def dimensions(self) -> ExpertDimensions:
        """Sizes of the routed experts.

        Raises:
            CheckpointError: config.json lacks one of them, as that of a dense model does.
        """
        try:
            return ExpertDimensions(
                **{name: int(self.config[name]) for name in ExpertDimensions.__dataclass_fields__},
            )
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self.path / 'config.json'} does not describe a MoE model that lightship knows: no usable {error}"
            ) from error

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the content of every shard and every companion: the identity of the model."""
        return digest_of(
            {p.name: digest_of_file(p) for p in [*(self.path / s for s in self.shards), *self.companions()]}
        )

    def companions(self) -> list[Path]:
        """Every file that is not weights: configuration, tokenizer, chat template, modelling code, licence."""
        files = (p for p in self.path.iterdir() if p.is_file() and not p.name.startswith("."))
        return sorted(p for p in files if p.suffix != ".safetensors" and p.name not in (INDEX, MANIFEST))

    def info(self, name: str) -> TensorInfo:
        """The tensor's description.

        Raises:
            CheckpointError: the checkpoint has no tensor of that name.
        """
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.path} has no tensor {name}; the checkpoint is incomplete") from None

    def reader(self) -> "TensorReader":
        """A reader that keeps its shards memory-mapped while it is used."""
        return TensorReader(self)

    @staticmethod
    def layer_number(layer_name: str) -> int:
        """`model.layers.3.mlp` -> 3."""
        return int(layer_name.split(".layers.")[1].split(".")[0])

    def expert_layers(self) -> dict[str, int]:
        """Names of the layers with routed experts (`model.layers.3.mlp`) -> how many experts each has, in order."""
        counts: dict[str, set[int]] = {}
        for name in self.tensors:
            if match := EXPERT.match(name):
                counts.setdefault(match["layer_name"], set()).add(int(match["expert"]))
        return {name: len(counts[name]) for name in sorted(counts, key=self.layer_number)}


class TensorReader:
    """Reads tensors, or parts of them, of an opened checkpoint; memory-maps each shard once."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._files: dict[str, Any] = {}

    def _slice(self, name: str) -> Any:
        from safetensors import safe_open

        shard = self.checkpoint.info(name).shard
        if shard not in self._files:
            self._files[shard] = safe_open(self.checkpoint.path / shard, framework="pt")
        return self._files[shard].get_slice(name)

    def read(self, name: str, *parts: slice) -> "torch.Tensor":
        """The tensor, or the part that `parts` selects (one slice a dimension), on the CPU in its stored dtype."""
        view = self._slice(name)
        if parts:
            return view[parts]
        return view[:] if self.checkpoint.info(name).shape else view[...]

    def read_finite(self, name: str, *parts: slice) -> "torch.Tensor":
        """As `read`, checked for NaN and infinity.

        Raises:
            CheckpointError: names the tensor and counts its bad values.
        """
        tensor = self.read(name, *parts)
        if tensor.dtype.is_floating_point:
            bad = int((~tensor.float().isfinite()).sum())
            if bad:
                raise CheckpointError(
                    f"{self.checkpoint.path / self.checkpoint.info(name).shard}: the tensor {name} has {bad} values "
                    "that are NaN or infinite; the download is damaged or the release is broken: verify its checksum"
                )
        return tensor


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
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        if 8 + length + end > size:
            raise CheckpointError(
                f"{path} is truncated: the tensor {name} ends at byte {8 + length + end}, the file at {size}; "
                "download the shard again"
            )
        tensors[name] = TensorInfo(name, path.name, entry["dtype"], tuple(entry["shape"]), end - begin)
    return tensors


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}; download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object; download it again")
    return value
