"""The result's shards, laid out before the first weight is rounded: every tensor has its place from the start.

The plan knows each tensor of the result by name, dtype and shape, so the headers are written and the disk space is
reserved first; a full disk is an error of the first second, not of the last hour. Tensors are then written in place, in
any order, by any number of threads and processes, and can be read back. Nothing waits in memory for its shard to fill.
"""

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightship.checkpoint import INDEX
from lightship.errors import LightshipError
from lightship.files import fsync
from lightship.quant.plan import PlannedOutput
from lightship.shards import BYTES_OF, torch_dtype
from lightship.summary import size

SHARD_BYTES = 4_000_000_000
FULL = (errno.ENOSPC, errno.EDQUOT)
"""What the system says of a full disk."""


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: which shard, at which byte of the file."""

    shard: int
    begin: int
    tensor: PlannedOutput


class Shards:
    """The safetensors files of a result in `directory`, each of at most `shard_bytes`, unless one tensor is more."""

    def __init__(self, directory: Path, tensors: Sequence[PlannedOutput], shard_bytes: int = SHARD_BYTES) -> None:
        self.directory = directory
        groups = list(_filled(tensors, shard_bytes))
        self.names = [f"model-{n + 1:05d}-of-{len(groups):05d}.safetensors" for n in range(len(groups))]
        self.places: dict[str, Place] = {}
        self._headers: list[bytes] = []
        self._sizes: list[int] = []
        for number, group in enumerate(groups):
            # Widest dtype first, as safetensors itself writes: every tensor is then aligned to its items.
            ordered = sorted(group, key=lambda t: -BYTES_OF[t.dtype])
            header, end = _header(ordered)
            for tensor, begin in zip(ordered, _begins(ordered), strict=True):
                self.places[tensor.name] = Place(number, len(header) + begin, tensor)
            self._headers.append(header)
            self._sizes.append(len(header) + end)
        self._files: dict[int, int] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all files, headers included."""
        return sum(self._sizes)

    def missing(self) -> list[Path]:
        """The files that are not there at their full size."""
        paths = [self.directory / name for name in self.names]
        return [
            path
            for path, nbytes in zip(paths, self._sizes, strict=True)
            if not path.is_file() or path.stat().st_size != nbytes
        ]

    def reserve(self) -> list[Path]:
        """Make every file that is not there yet at its full size; returns those that were made.

        Raises:
            LightshipError: the disk has no room for all of them; what was reserved is given back.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        made = self.missing()
        for number, (name, header, nbytes) in enumerate(zip(self.names, self._headers, self._sizes, strict=True)):
            path = self.directory / name
            try:
                if path in made:
                    with path.open("wb") as file:
                        _allocate(file.fileno(), nbytes)
                write_at(self._file(number), header, 0)
            except OSError as error:
                if error.errno not in FULL:
                    raise
                # An open file keeps its space, name or no name.
                self.close()
                for partial in made:
                    partial.unlink(missing_ok=True)
                free = os.statvfs(self.directory).f_bavail * os.statvfs(self.directory).f_frsize
                raise LightshipError(
                    f"{self.directory} has no room for the result: it takes {size(self.nbytes)}, {size(free)} is free "
                    "there; free some or name a directory on another disk"
                ) from None
        if made:
            fsync(self.directory)
        return made

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor (on the CPU) to its place; it must have the planned dtype and shape."""
        place = self.places[name]
        assert tensor.dtype == torch_dtype(place.tensor.dtype), (name, tensor.dtype)
        assert list(tensor.shape) == list(place.tensor.shape), (name, tensor.shape)
        with refusing_a_full_disk(self.directory / self.names[place.shard]):
            write_at(self._file(place.shard), bytes_of(tensor), place.begin)

    def read(self, name: str) -> torch.Tensor:
        """The tensor as it was written."""
        place = self.places[name]
        buffer = torch.empty(place.tensor.nbytes, dtype=torch.uint8)
        read = os.preadv(self._file(place.shard), [buffer.numpy().data], place.begin)
        assert read == place.tensor.nbytes
        return buffer.view(torch_dtype(place.tensor.dtype)).reshape(place.tensor.shape)

    def sync(self, names: Sequence[str] | None = None) -> None:
        """Wait until the tensors `names` (all if absent) are on the disk."""
        for number in {self.places[n].shard for n in names} if names is not None else range(len(self.names)):
            with refusing_a_full_disk(self.directory / self.names[number]):
                os.fdatasync(self._file(number))

    def write_index(self) -> None:
        """Write model.safetensors.index.json."""
        weight_map = {name: self.names[place.shard] for name, place in sorted(self.places.items())}
        total = sum(place.tensor.nbytes for place in self.places.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (self.directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def _file(self, number: int) -> int:
        if number not in self._files:
            descriptor = os.open(self.directory / self.names[number], os.O_RDWR)
            if self._files.setdefault(number, descriptor) != descriptor:
                os.close(descriptor)
        return self._files[number]


@contextlib.contextmanager
def refusing_a_full_disk(path: Path) -> Iterator[None]:
    """Turn the error of a full disk into one that says what to do.

    Raises:
        LightshipError: in place of that OSError.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise LightshipError(
            f"the disk of {path} is full; free some space and run the same command again: it goes on from the last "
            "finished expert"
        ) from error


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes in memory order, without a copy if it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_at(file: int, data: bytes | memoryview, position: int) -> None:
    """Write all of `data` at `position` of an open file."""
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, position)
        view, position = view[written:], position + written


def _filled(tensors: Sequence[PlannedOutput], shard_bytes: int) -> Iterator[list[PlannedOutput]]:
    group: list[PlannedOutput] = []
    filled = 0
    for tensor in tensors:
        if group and filled + tensor.nbytes > shard_bytes:
            yield group
            group, filled = [], 0
        group.append(tensor)
        filled += tensor.nbytes
    if group:
        yield group


def _begins(tensors: Sequence[PlannedOutput]) -> Iterator[int]:
    begin = 0
    for tensor in tensors:
        yield begin
        begin += tensor.nbytes


def _header(tensors: Sequence[PlannedOutput]) -> tuple[bytes, int]:
    """The file's start (length and JSON, padded to eight bytes) and how many bytes of tensors follow it."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [end, end := end + tensor.nbytes],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, end


def _allocate(file: int, nbytes: int) -> None:
    try:
        os.posix_fallocate(file, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(file, nbytes)
