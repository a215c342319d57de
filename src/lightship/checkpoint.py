"""A checkpoint directory, opened by its headers: which tensor lies in which shard, with which dtype and shape.

Opening reads a few kilobytes a shard and checks what can be checked without the data: every shard of the index is there
and as long as its header says, and index and shards name the same tensors.
"""

import json
import os
import re
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from lightship.architecture import Architecture, architecture_of
from lightship.errors import CheckpointError
from lightship.files import digest_of, digest_of_file
from lightship.shards import TensorInfo, digest_of_header, read_header, torch_dtype
from lightship.weights import number

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MANIFEST = "lightship.json"
"""Written by lightship beside the weights; see `lightship.manifest`."""
READ_BYTES = 1 << 30
"""The most that one system call reads; Linux stops at 2 GiB."""
HASH_THREADS = 8

EXPERT = re.compile(
    r"(?P<layer_name>.*\.layers\.\d+\.mlp)\.experts\.(?P<expert>\d+)\."
    r"(?P<projection>gate_proj|up_proj|down_proj)\.(?P<part>weight|weight_scale_inv)$"
)
"""Names of the routed experts' tensors, as DeepSeek, Kimi and their relatives release them."""


@dataclass(frozen=True)
class ExpertDimensions:
    """Sizes of the routed experts, from config.json, under DeepSeek's names whatever the family calls them."""

    hidden_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_hidden_layers: int
    num_experts_per_tok: int
    mtp_layers: int
    """Declared by config.json; a release may leave them out all the same."""


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
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise CheckpointError(
                    f"{index_file} places the tensor {name} in {shard!r}, which is not a file of the directory itself; "
                    "lightship does not follow it: download the index again from its source"
                )
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
            CheckpointError: config.json lacks one of them, as that of a dense model does, or is of an unknown family.
        """
        family, config = self.architecture, self.config
        try:
            return ExpertDimensions(
                hidden_size=number(config, "hidden_size"),
                moe_intermediate_size=number(config, "moe_intermediate_size"),
                n_routed_experts=family.experts(config),
                num_hidden_layers=number(config, "num_hidden_layers"),
                num_experts_per_tok=number(config, "num_experts_per_tok"),
                mtp_layers=family.mtp_layers(config),
            )
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}") from None

    @cached_property
    def architecture(self) -> Architecture:
        """The declaration of the model's family.

        Raises:
            CheckpointError: there is none; says what one would need.
        """
        try:
            return architecture_of(self.config, self.tensors)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}") from None

    def transformers_config(self) -> Any:
        """The `PretrainedConfig` that transformers builds the model from, without the source's quantization.

        Raises:
            CheckpointError: the family is unknown to lightship, or to the installed transformers.
        """
        from transformers import __version__
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        built_as = self.architecture.transformers_type
        if built_as not in CONFIG_MAPPING:
            raise CheckpointError(
                f"{self.path / 'config.json'}: {built_as!r} is not one that transformers {__version__} can build "
                "without the release's own code, which lightship does not run; install a newer transformers"
            )
        left_out = ("quantization_config", "auto_map", "model_type")
        return CONFIG_MAPPING[built_as].from_dict({k: v for k, v in self.config.items() if k not in left_out})

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the content of every shard and every companion: the identity of the model."""
        files = [*(self.path / shard for shard in self.shards), *self.companions()]
        with ThreadPoolExecutor(HASH_THREADS) as threads:
            return digest_of(dict(zip((p.name for p in files), threads.map(digest_of_file, files), strict=True)))

    def fingerprint(self) -> dict[str, str]:
        """File -> a digest that changes when the file does, without reading the weights: of a shard's size, time of
        change and header, of a companion's content. Read from the disk anew at every call."""
        digests = {shard: digest_of_header(self.path / shard) for shard in self.shards}
        return digests | {companion.name: digest_of_file(companion) for companion in self.companions()}

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
        """A reader that keeps its shards open while it is used."""
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
    """Reads tensors, or parts of them, of an opened checkpoint into memory of their own; threads may share it.

    Not memory-mapped: mapped pages count as this process's memory, and waiting for one holds Python's lock.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._files: dict[str, int] = {}
        self._lock = Lock()
        weakref.finalize(self, _close, self._files)

    def read(self, name: str, *parts: slice, pinned: bool = False) -> "torch.Tensor":
        """The tensor, or the part that `parts` selects (one slice a dimension), on the CPU in its stored dtype.

        Of a slice of the first dimension only its own bytes are read; further slices are cut afterwards. With `pinned`,
        the memory is page-locked, from which a GPU copies without waiting.

        Raises:
            CheckpointError: there is no such tensor, its dtype is unknown, or its file ends before it does.
        """
        import torch

        info = self.checkpoint.info(name)
        dtype = torch_dtype(info.dtype)
        first, last = 0, 1
        shape = info.shape
        if parts:
            first, last, step = parts[0].indices(shape[0])
            assert step == 1
            shape = (max(last - first, 0), *shape[1:])
        rows = info.shape[0] if parts else 1
        stride = info.nbytes // rows if rows else 0
        buffer = torch.empty(stride * max(last - first, 0), dtype=torch.uint8, pin_memory=pinned)
        self._fill(info, buffer.numpy().data, info.offset + first * stride)
        tensor = buffer.view(dtype).reshape(shape)
        return tensor[(slice(None), *parts[1:])].contiguous() if len(parts) > 1 else tensor

    def _fill(self, info: TensorInfo, buffer: memoryview, offset: int) -> None:
        file = self._file(info.shard)
        filled = 0
        while filled < len(buffer):
            got = os.preadv(file, [buffer[filled : filled + READ_BYTES]], offset + filled)
            if not got:
                raise CheckpointError(
                    f"{self.checkpoint.path / info.shard} ends at byte {offset + filled}, within the tensor "
                    f"{info.name}: it was cut after it was opened; download the shard again"
                )
            filled += got

    def _file(self, shard: str) -> int:
        with self._lock:
            if shard not in self._files:
                self._files[shard] = os.open(self.checkpoint.path / shard, os.O_RDONLY | os.O_CLOEXEC)
            return self._files[shard]

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


def _close(files: dict[str, int]) -> None:
    for file in files.values():
        os.close(file)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}; download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object; download it again")
    return value
