"""The machine that figures were measured on, in words."""

import os
from pathlib import Path


def describe_machine() -> str:
    """This machine's GPUs, if any, processor and usable cores: `Intel(R) Xeon(R) …, 8 cores`."""
    gpus = [
        line.partition(":")[2].strip()
        for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
        for line in path.read_text().splitlines()
        if line.startswith("Model:")
    ]
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = next((line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")), "CPU")
    return ", ".join([*(f"{gpus.count(g)}× {g}" for g in sorted(set(gpus))), processor, f"{os.cpu_count()} cores"])
