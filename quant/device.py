"""The device that rounds, and the memory there is."""

import ctypes
import os
from contextlib import suppress
from pathlib import Path

import torch

from lightship.errors import LightshipError

DEVICE = "LIGHTSHIP_DEVICE"
ROOM = 0.3
"""The part of a GPU's free memory that calibration's hidden states may take."""
M_MMAP_THRESHOLD = -3
"""mallopt's name for it, from malloc.h."""
LARGE = 1 << 20
"""Bytes of a block that has pages of its own; setting it keeps glibc from raising it to 32 MiB by itself."""


def choose_device(name: str = "auto") -> torch.device:
    """`auto` is $LIGHTSHIP_DEVICE, else a GPU if there is one, else the CPU.

    Raises:
        LightshipError: there is no such device.
    """
    if name == "auto":
        name = os.environ.get(DEVICE) or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise LightshipError(f"the device {name!r} cannot be used: {error}; name another with --device") from error
    return device


def free_memory() -> int:
    """Bytes that this machine can still give."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def has_room(device: torch.device, nbytes: int) -> bool:
    """Whether hidden states of that size may stay on the device; never on a CPU, whose memory has its own budget."""
    return device.type == "cuda" and nbytes <= ROOM * torch.cuda.mem_get_info(device)[0]


def return_freed_memory() -> None:
    """From now on, have the C library return large freed blocks of this process to the system at once; glibc alone.

    By itself, glibc keeps some for every thread, and reader threads free what others have allocated: a run of many
    layers would grow, a little with each.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE)
