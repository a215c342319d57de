"""GPTQ and coordinate descent on a GPU: a program keeps some outputs of a block of columns in registers.

Within a block the columns are sequential; outputs are independent, so each program takes a few. Between blocks the
work is matrix products, left to cuBLAS in float32 (TF32 if the caller allowed it for all of torch).
"""

import torch
import triton
import triton.language as tl

from lightship.quant.mse_triton import nearest

BLOCK = 128
ROWS = 16
"""Outputs a program: 4096 of them still fill the multiprocessors of an H100."""


def round_columns(
    w_OI: torch.Tensor, scale_OG: torch.Tensor, group_I: torch.Tensor, upper_II: torch.Tensor
) -> torch.Tensor:
    """As `gptq.round_columns`."""
    outputs, inputs = w_OI.shape
    assert inputs % BLOCK == 0
    w_OI = w_OI.clone(memory_format=torch.contiguous_format)
    q_OI = torch.empty(outputs, inputs, dtype=torch.int8, device=w_OI.device)
    error_Ob = torch.empty(outputs, BLOCK, device=w_OI.device)
    scale_OG, group_I, upper_II = scale_OG.contiguous(), group_I.to(torch.int32), upper_II.contiguous()
    with torch.cuda.device_of(w_OI):
        for start in range(0, inputs, BLOCK):
            _round_block[(triton.cdiv(outputs, ROWS),)](
                w_OI, q_OI, error_Ob, scale_OG, group_I, upper_II, start, outputs, inputs, scale_OG.shape[1],
                ROWS=ROWS, BLOCK=BLOCK,
            )  # fmt: skip
            after = slice(start + BLOCK, inputs)
            if after.start < inputs:
                w_OI[:, after].addmm_(error_Ob, upper_II[start : after.start, after], alpha=-1)
    return q_OI


def descend(
    w_OI: torch.Tensor,
    q_OI: torch.Tensor,
    scale_OG: torch.Tensor,
    group_I: torch.Tensor,
    damped_II: torch.Tensor,
    sweeps: int,
) -> torch.Tensor:
    """As `descent.descend`."""
    outputs, inputs = w_OI.shape
    assert inputs % BLOCK == 0
    q_OI = q_OI.clone(memory_format=torch.contiguous_format)
    scale_OG, group_I, damped_II = scale_OG.contiguous(), group_I.to(torch.int32), damped_II.contiguous()
    with torch.cuda.device_of(w_OI):
        for _ in range(sweeps):
            residual_OI = torch.addcmul(w_OI, q_OI.float(), scale_OG.float()[:, group_I], value=-1).contiguous()
            for start in range(0, inputs, BLOCK):
                gradient_Ob = residual_OI @ damped_II[:, start : start + BLOCK]
                _sweep_block[(triton.cdiv(outputs, ROWS),)](
                    gradient_Ob, q_OI, residual_OI, scale_OG, group_I, damped_II, start, outputs, inputs,
                    scale_OG.shape[1], ROWS=ROWS, BLOCK=BLOCK,
                )  # fmt: skip
    return q_OI


@triton.jit
def _column(tile, here):
    """One column of a tile [rows, columns]: the one where `here` [columns] holds."""
    return tl.sum(tl.where(here[None, :], tile, 0.0), axis=1)


@triton.jit
def _round_block(
    w_ptr, q_ptr, error_ptr, scale_ptr, group_ptr, upper_ptr, start, outputs, inputs, groups, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = row[:, None] < outputs
    offsets = row[:, None].to(tl.int64) * inputs + start + column[None, :]
    w = tl.load(w_ptr + offsets, mask=inside, other=0.0)
    q = tl.zeros((ROWS, BLOCK), tl.float32)
    for i in range(BLOCK):
        here = column == i
        upper_row = upper_ptr + (start + i).to(tl.int64) * inputs + start
        upper = tl.load(upper_row + column)
        scale = tl.load(scale_ptr + row * groups + tl.load(group_ptr + start + i), mask=row < outputs, other=1.0)
        scale = scale.to(tl.float32)
        value = _column(w, here)
        rounded = nearest(tl.math.div_rn(value, scale), -8.0, 7.0)
        diagonal = tl.full(scale.shape, 1.0, tl.float32) * tl.load(upper_row + i)
        error = tl.math.div_rn(value - rounded * scale, diagonal)
        q = tl.where(here[None, :], rounded[:, None], q)
        # A column that is done has no use for its weight and keeps its error instead: the triangle is zero there.
        w = tl.where(here[None, :], error[:, None], w - error[:, None] * upper[None, :])
    tl.store(q_ptr + offsets, q.to(tl.int8), mask=inside)
    tl.store(error_ptr + row[:, None] * BLOCK + column[None, :], w, mask=inside)


@triton.jit
def _sweep_block(
    gradient_ptr, q_ptr, residual_ptr, scale_ptr, group_ptr, damped_ptr, start, outputs, inputs, groups,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = row[:, None] < outputs
    offsets = row[:, None].to(tl.int64) * inputs + start + column[None, :]
    gradient = tl.load(gradient_ptr + row[:, None] * BLOCK + column[None, :], mask=inside, other=0.0)
    q = tl.load(q_ptr + offsets, mask=inside, other=0).to(tl.float32)
    residual = tl.load(residual_ptr + offsets, mask=inside, other=0.0)
    for i in range(BLOCK):
        here = column == i
        damped_row = damped_ptr + (start + i).to(tl.int64) * inputs + start
        damped = tl.load(damped_row + column)
        scale = tl.load(scale_ptr + row * groups + tl.load(group_ptr + start + i), mask=row < outputs, other=1.0)
        scale = scale.to(tl.float32)
        old = _column(q, here)
        step = tl.load(damped_row + i) * scale
        new = nearest(tl.math.div_rn(_column(gradient, here), step) + old, -8.0, 7.0)
        change = (old - new) * scale
        q = tl.where(here[None, :], new[:, None], q)
        residual = tl.where(here[None, :], residual + change[:, None], residual)
        gradient += change[:, None] * damped[None, :]
    tl.store(q_ptr + offsets, q.to(tl.int8), mask=inside)
    tl.store(residual_ptr + offsets, residual, mask=inside)
