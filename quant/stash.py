"""Hidden states between blocks, for all calibration tokens at once: on the GPU or in memory if they fit, else on disk.

What enters the block that is at work is always on disk too, whole, so that a crash costs no more than that block's
forward pass.
"""

import os
from pathlib import Path

import torch

from lightship.files import PARTIAL
from lightship.quant.device import has_room
from lightship.quant.layout import bytes_of, refusing_a_full_disk

TENSORS = 5
"""Alive at once, [tokens, hidden] each: what enters a block, what leaves it, the experts' inputs and their sums."""

CPU = torch.device("cpu")
ROWS = 1 << 14
"""Written at a time."""


class Stash:
    """Tensors [tokens, hidden] by name. T tokens, H hidden size.

    Args:
        memory: bytes that all tensors together may take in host memory; beyond it, files are mapped in their place.
        device: the one that computes; the tensors stay on it if they all fit into a part of what is free there.
    """

    def __init__(
        self, directory: Path, tokens: int, hidden: int, dtype: torch.dtype, memory: int, device: torch.device = CPU
    ) -> None:
        self.directory = directory
        self.shape = (tokens, hidden)
        self.dtype = dtype
        nbytes = TENSORS * tokens * hidden * dtype.itemsize
        self.device = device if has_room(device, nbytes) else CPU
        self.on_disk = self.device == CPU and nbytes > memory
        directory.mkdir(exist_ok=True)

    def empty(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor to fill; mapped from a file of that name if the stash is on disk."""
        dtype = dtype or self.dtype
        if not self.on_disk:
            return torch.empty(self.shape, dtype=dtype, device=self.device)
        path = self._partial(name)
        nbytes = self.shape[0] * self.shape[1] * dtype.itemsize
        with refusing_a_full_disk(path), path.open("wb") as file:
            # A page that a full disk cannot back would end the process without a word when it is written.
            os.posix_fallocate(file.fileno(), 0, nbytes)
        return torch.from_file(str(path), shared=True, size=nbytes // dtype.itemsize, dtype=dtype).view(self.shape)

    def save(self, name: str, tensor_TH: torch.Tensor) -> None:
        """Make `tensor_TH`, which `empty` gave under this name, durable and visible to `load`."""
        path = self._partial(name)
        with refusing_a_full_disk(path), path.open("r+b" if self.on_disk else "wb") as file:
            if not self.on_disk:
                for rows_RH in tensor_TH.split(ROWS):
                    file.write(bytes_of(rows_RH.cpu()))
                file.flush()
            os.fsync(file.fileno())
        path.rename(self.directory / name)

    def load(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A saved tensor; never write to it."""
        dtype = dtype or self.dtype
        count = self.shape[0] * self.shape[1]
        mapped = torch.from_file(str(self.directory / name), shared=True, size=count, dtype=dtype).view(self.shape)
        return mapped if self.on_disk else mapped.to(self.device, copy=True)

    def remove(self, name: str) -> None:
        (self.directory / name).unlink(missing_ok=True)
        self._partial(name).unlink(missing_ok=True)

    def _partial(self, name: str) -> Path:
        return self.directory / (name + PARTIAL)
