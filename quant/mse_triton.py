"""The MSE grid on a GPU: each group's weights are read once, and all scales are tried in registers.

The arithmetic of every weight is that of `mse.py`. Only the order in which a group's errors are summed differs, so two
scales whose errors are equal to seven digits may be chosen differently.
"""

import torch
import triton
import triton.language as tl

from lightship.quant.mse import COARSE_COUNT, COARSE_FIRST, COARSE_STEP, FINE
from lightship.w4afp8 import GROUP

ROWS = 16
"""Outputs a program: 16 x 128 FP8 weights are 16 bytes a thread, the widest load. Divides the side of an FP8 block."""

GRID = {
    "FIRST": COARSE_FIRST,
    "STEP": COARSE_STEP,
    "COUNT": COARSE_COUNT,
    "FINE": len(FINE),
    "FINE_STEP": FINE[-1] / (len(FINE) // 2),
}


def quantize_fp8_blocks(
    q_OI: torch.Tensor, scale_inv: torch.Tensor, *, signed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `mse.quantize_fp8_blocks_mse`."""
    outputs, inputs = q_OI.shape
    assert inputs % GROUP == 0
    packed = torch.empty(outputs, inputs // 2, dtype=torch.int8, device=q_OI.device)
    scale_OG = torch.empty(outputs, inputs // GROUP, dtype=torch.bfloat16, device=q_OI.device)
    with torch.cuda.device_of(q_OI):
        _quantize_fp8_blocks[(triton.cdiv(outputs, ROWS), inputs // GROUP)](
            q_OI.contiguous(), scale_inv.contiguous(), packed, scale_OG, outputs, inputs, SIGNED=signed, ROWS=ROWS,
            GROUP=GROUP, **GRID, enable_fp_fusion=False,
        )  # fmt: skip
    return packed, scale_OG


def best_scales(w_OI: torch.Tensor, *, signed: bool, weight_I: torch.Tensor | None) -> torch.Tensor:
    """As `mse.best_scales`."""
    outputs, inputs = w_OI.shape
    assert inputs % GROUP == 0
    w_OI = w_OI.contiguous()
    scale_OG = torch.empty(outputs, inputs // GROUP, dtype=torch.bfloat16, device=w_OI.device)
    with torch.cuda.device_of(w_OI):
        _best_scales[(triton.cdiv(outputs, ROWS), inputs // GROUP)](
            w_OI, w_OI if weight_I is None else weight_I.contiguous(), scale_OG, outputs, inputs,
            WEIGHTED=weight_I is not None, SIGNED=signed, ROWS=ROWS, GROUP=GROUP, **GRID, enable_fp_fusion=False,
        )  # fmt: skip
    return scale_OG


@triton.jit
def nearest(x, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Round half to even, within [LOW, HIGH]: adding 1.5 * 2²³ leaves no bits for a fraction."""
    return (tl.minimum(tl.maximum(x, LOW), HIGH) + 12582912.0) - 12582912.0


@triton.jit
def _round_to_bf16(x):
    """The nearest bf16, ties to even, as float32; written out, because Triton's interpreter, for tests, truncates."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _quantize_fp8_blocks(
    q_ptr, scale_inv_ptr, packed_ptr, scale_ptr, outputs, inputs, SIGNED: tl.constexpr, ROWS: tl.constexpr,
    GROUP: tl.constexpr, FIRST: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr, FINE: tl.constexpr,
    FINE_STEP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    groups = inputs // GROUP
    column = group * GROUP + tl.arange(0, GROUP)
    inside = row[:, None] < outputs
    block_scale = tl.load(scale_inv_ptr + (tl.program_id(0) * ROWS // GROUP) * groups + group)
    offsets = row[:, None].to(tl.int64) * inputs + column[None, :]
    w = tl.load(q_ptr + offsets, mask=inside, other=0.0).to(tl.float32) * block_scale
    scale = _best_scale(w, w, False, SIGNED, FIRST, STEP, COUNT, FINE, FINE_STEP)
    q = nearest(tl.math.div_rn(w, tl.broadcast_to(scale[:, None], w.shape)), -8.0, 7.0).to(tl.int32)
    low, high = tl.split(tl.reshape(q, (ROWS, GROUP // 2, 2)))
    byte = group * (GROUP // 2) + tl.arange(0, GROUP // 2)
    packed_offsets = row[:, None].to(tl.int64) * (inputs // 2) + byte[None, :]
    tl.store(packed_ptr + packed_offsets, ((high << 4) | (low & 15)).to(tl.int8), mask=inside)
    tl.store(scale_ptr + row.to(tl.int64) * groups + group, scale.to(tl.bfloat16), mask=row < outputs)


@triton.jit
def _best_scales(
    w_ptr, weight_ptr, scale_ptr, outputs, inputs, WEIGHTED: tl.constexpr, SIGNED: tl.constexpr, ROWS: tl.constexpr,
    GROUP: tl.constexpr, FIRST: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr, FINE: tl.constexpr,
    FINE_STEP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    column = group * GROUP + tl.arange(0, GROUP)
    offsets = row[:, None].to(tl.int64) * inputs + column[None, :]
    w = tl.load(w_ptr + offsets, mask=row[:, None] < outputs, other=0.0)
    weight = w
    if WEIGHTED:
        weight = tl.broadcast_to(tl.load(weight_ptr + column)[None, :], w.shape)
    scale = _best_scale(w, weight, WEIGHTED, SIGNED, FIRST, STEP, COUNT, FINE, FINE_STEP)
    groups = inputs // GROUP
    tl.store(scale_ptr + row.to(tl.int64) * groups + group, scale.to(tl.bfloat16), mask=row < outputs)


@triton.jit
def _best_scale(
    w, weight, WEIGHTED: tl.constexpr, SIGNED: tl.constexpr, FIRST: tl.constexpr, STEP: tl.constexpr,
    COUNT: tl.constexpr, FINE: tl.constexpr, FINE_STEP: tl.constexpr,
):  # fmt: skip
    """The scale of each row of w [rows, 128]: float32 [rows], a bf16 number."""
    magnitude = tl.abs(w)
    amax = tl.maximum(tl.max(magnitude, axis=1), 1e-12)
    least = tl.full(amax.shape, float("inf"), tl.float32)
    best = amax
    best_divisor = amax
    for step in range(COUNT):
        divisor = tl.full(amax.shape, FIRST, tl.float32) + step * STEP
        scale, error = _attempt(w, magnitude, weight, amax, divisor, WEIGHTED, SIGNED)
        better = error < least
        least = tl.where(better, error, least)
        best = tl.where(better, scale, best)
        best_divisor = tl.where(better, divisor, best_divisor)
    for step in range(FINE):
        side = step - FINE // 2  # ..., -1, 0, ...: the coarse winner itself was judged already, so 0 means +1
        divisor = best_divisor + (side + (side >= 0).to(tl.int32)) * FINE_STEP
        scale, error = _attempt(w, magnitude, weight, amax, divisor, WEIGHTED, SIGNED)
        better = error < least
        least = tl.where(better, error, least)
        best = tl.where(better, scale, best)
    return best


@triton.jit
def _attempt(w, magnitude, weight, amax, divisor, WEIGHTED: tl.constexpr, SIGNED: tl.constexpr):
    """The scale amax / divisor, or its negative if that is better, and its squared error; see `mse._errors`."""
    scale = _round_to_bf16(tl.math.div_rn(amax, divisor))
    inverse = tl.math.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    limit = 7.5 * scale
    q = tl.minimum((magnitude * inverse[:, None] + 12582912.0) - 12582912.0, 8.0)
    miss = tl.fma(-q, tl.broadcast_to(scale[:, None], q.shape), magnitude)  # q * scale is exact, fused or not
    above = tl.maximum(w - limit[:, None], 0.0)
    below = tl.maximum(-limit[:, None] - w, 0.0)
    square = miss * miss
    if WEIGHTED:
        square *= weight
        above *= weight
        below *= weight
    both = tl.sum(square, axis=1)
    error = both + 2 * scale * tl.sum(above, axis=1)
    if SIGNED:
        negative = both + 2 * scale * tl.sum(below, axis=1)
        scale = tl.where(negative < error, -scale, scale)
        error = tl.minimum(error, negative)
    return scale, error
