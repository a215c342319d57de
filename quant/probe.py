"""Measure this machine for the time estimate of `lightship plan`: its disk, its arithmetic, and one expert.

The disk is measured on the checkpoint's own shards, after asking the kernel to forget what it has cached of them.
"""

import os
import time
from collections.abc import Callable

import torch

from lightship.checkpoint import Checkpoint
from lightship.quant.expert import ExpertRounder, ExpertWeights
from lightship.recipe import Quantization
from lightship.records import Probe
from lightship.w4afp8 import GROUP, dequantize_fp8_blocks

CHUNK = 16 << 20
READ_SHARE = 0.3
"""Of the time, for the disk."""
EXPERT_SHARE = 0.5
"""Of the time; an expert that is expected to take longer is measured smaller and scaled up."""
READ_LEAST = 8 * CHUNK
FACTORIZATION = 8
"""Operations of a Hessian's Cholesky factors and inverse, times side³, in float64, which is taken to cost double."""


def measure(checkpoint: Checkpoint, settings: Quantization, tokens: int, device: torch.device, seconds: float) -> Probe:
    """Measure for about `seconds`; `tokens` is how many of the calibration's an expert sees on average."""
    start = time.monotonic()
    read_bytes, read_seconds = _read(checkpoint, seconds * READ_SHARE)
    flops = _flops(device)
    expert_seconds, arithmetic = _expert(checkpoint, settings, tokens, device, flops, seconds * EXPERT_SHARE)
    return Probe(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {os.cpu_count()} cores",
        read_bytes=read_bytes,
        read_seconds=read_seconds,
        flops=flops,
        expert_seconds=expert_seconds,
        expert_arithmetic=arithmetic,
        seconds=time.monotonic() - start,
    )


def _read(checkpoint: Checkpoint, seconds: float) -> tuple[int, float]:
    """Bytes read and the time that took, shard after shard from the beginning, not from the cache."""
    buffer = memoryview(bytearray(CHUNK))
    start, done = time.monotonic(), 0
    for shard in checkpoint.shards:
        file = os.open(checkpoint.path / shard, os.O_RDONLY)
        try:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            offset = 0
            while got := os.preadv(file, [buffer], offset):
                offset += got
                done += got
                if done >= READ_LEAST and time.monotonic() - start > seconds:
                    return done, time.monotonic() - start
        finally:
            os.close(file)
    return done, time.monotonic() - start


def _flops(device: torch.device) -> float:
    """Multiplications and additions a second of a matrix product as the blocks compute it."""
    side, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    _timed(lambda: a @ b, device)
    return 2 * side**3 / min(_timed(lambda: a @ b, device) for _ in range(3))


def _expert(
    checkpoint: Checkpoint, settings: Quantization, tokens: int, device: torch.device, flops: float, budget: float
) -> tuple[float, str]:
    """Seconds to round one expert, and how they were found."""
    sizes = checkpoint.dimensions
    hidden, intermediate = sizes.hidden_size, sizes.moe_intermediate_size
    whole = _operations(hidden, intermediate, tokens)
    smaller = 1
    while _operations(hidden // smaller, intermediate // smaller, tokens // smaller) / flops > budget / 2:
        smaller *= 2
    part_hidden, part_intermediate = _groups(hidden // smaller), _groups(intermediate // smaller)
    part_tokens = max(tokens // smaller, 1)
    weights = _first_expert(checkpoint, device, part_hidden, part_intermediate)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x_tH = torch.randn(part_tokens, part_hidden, device=device, dtype=dtype)
    router_t = torch.full((part_tokens,), 0.1, device=device)
    rounder = ExpertRounder(settings, sizes.num_hidden_layers - 1, x_tH[:GROUP])
    if device.type == "cuda":
        # The first run compiles kernels and finds workspaces.
        rounder.round(0, weights, x_tH, router_t)
    with torch.inference_mode():
        measured = _timed(lambda: rounder.round(0, weights, x_tH, router_t), device)
    said = f"{settings.method}, [{part_intermediate}, {part_hidden}] on {part_tokens:,} tokens: {measured:.2f} s"
    if smaller == 1:
        return measured, said
    ratio = whole / _operations(part_hidden, part_intermediate, part_tokens)
    return (
        measured * ratio,
        f"{said}, x {ratio:.1f} operations of [{intermediate}, {hidden}] on {tokens:,} = {measured * ratio:.1f} s",
    )


def _operations(hidden: int, intermediate: int, tokens: int) -> float:
    """Of rounding one expert by GPTQ: Hessians, their factors, the compensation, the replay."""
    hessians = 2 * tokens * (hidden**2 + intermediate**2)
    factors = 2 * FACTORIZATION * (hidden**3 + intermediate**3) / 3
    compensation = 2 * (2 * intermediate * hidden**2 + hidden * intermediate**2)
    grid = 1500 * 3 * hidden * intermediate
    return hessians + factors + compensation + grid + 4 * tokens * hidden * intermediate


def _groups(size: int) -> int:
    return max(size // GROUP, 1) * GROUP


def _first_expert(checkpoint: Checkpoint, device: torch.device, hidden: int, intermediate: int) -> ExpertWeights:
    """The first expert's weights, or their first rows and columns, in float32."""
    name = f"{next(iter(checkpoint.expert_layers()))}.experts.0"
    reader = checkpoint.reader()

    def weight(projection: str, rows: int, columns: int) -> torch.Tensor:
        stored = reader.read(f"{name}.{projection}.weight", slice(rows), slice(columns)).to(device)
        if stored.dtype != torch.float8_e4m3fn:
            return stored.float()
        blocks = slice(rows // GROUP), slice(columns // GROUP)
        return dequantize_fp8_blocks(stored, reader.read(f"{name}.{projection}.weight_scale_inv", *blocks).to(device))

    gate_and_up = [weight(p, intermediate, hidden) for p in ("gate_proj", "up_proj")]
    return ExpertWeights(torch.cat(gate_and_up), weight("down_proj", hidden, intermediate))


def _timed(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
