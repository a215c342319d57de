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


def give_back_memory() -> None:
    """Return what the C library keeps of freed memory to the system; nothing where it is not glibc.

    Reader threads free what other threads have allocated, and glibc would keep some of it for each of them.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
