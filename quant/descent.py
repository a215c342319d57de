"""Coordinate descent: go over the columns of a rounded weight and round each anew, given all the others.

With R = W - Q * scale, the error tr(R H Rᵀ) as a function of one column is a parabola whose least point among the
int4 values is the one nearest to q + (R H)_j / (H_jj scale_j). So no step makes the error larger, and a sweep
repairs what GPTQ could not know when it rounded the column: how the columns after it fell.
"""

import torch

from lightship.quant.rounding import runs_triton
from lightship.w4afp8 import INT4_MAX, INT4_MIN

BLOCK = 128
"""Columns whose share of R H is computed at once, and kept up to date among themselves."""

PART = 16
"""Columns of a block after which it is brought up to date for the rest of the block."""


def descend(
    w_OI: torch.Tensor,
    q_OI: torch.Tensor,
    scale_OG: torch.Tensor,
    group_I: torch.Tensor,
    damped_II: torch.Tensor,
    sweeps: int,
) -> torch.Tensor:
    """Improve q_OI int8 [out, in], a rounding of w_OI float32, in `sweeps` passes over all columns.

    Args:
        scale_OG: bf16 [out, groups].
        group_I: int64 [in], which of the scales a column has.
        damped_II: float32 [in, in], symmetric and positive definite.

    Returns:
        int8 [out, in].
    """
    if runs_triton(w_OI):
        from lightship.quant.gptq_triton import descend as descend_on_gpu

        return descend_on_gpu(w_OI, q_OI, scale_OG, group_I, damped_II, sweeps)
    scale_IO = scale_OG.float().T[group_I]
    q_IO = q_OI.T.float()
    for _ in range(sweeps):
        residual_IO = w_OI.T - q_IO * scale_IO
        for start in range(0, len(q_IO), BLOCK):
            block = slice(start, start + BLOCK)
            gradient_bO = damped_II[block] @ residual_IO
            _sweep_block(q_IO[block], gradient_bO, residual_IO[block], scale_IO[block], damped_II[block, block])
    return q_IO.T.to(torch.int8)


def _sweep_block(
    q_bO: torch.Tensor,
    gradient_bO: torch.Tensor,
    residual_bO: torch.Tensor,
    scale_bO: torch.Tensor,
    damped_bb: torch.Tensor,
) -> None:
    """Round a block's columns anew, in place; its residual and its gradient R H follow, a PART of it at a time."""
    step_bO = damped_bb.diagonal()[:, None] * scale_bO
    change_bO = torch.empty_like(q_bO)
    for start in range(0, len(q_bO), PART):
        end = min(start + PART, len(q_bO))
        for i in range(start, end):
            new_O = (gradient_bO[i] / step_bO[i]).add_(q_bO[i]).round_().clamp_(INT4_MIN, INT4_MAX)
            change_bO[i] = (q_bO[i] - new_O).mul_(scale_bO[i])
            q_bO[i] = new_O
            gradient_bO[i + 1 : end].addr_(damped_bb[i, i + 1 : end], change_bO[i])
        gradient_bO[end:].addmm_(damped_bb[end:, start:end], change_bO[start:end])
    residual_bO += change_bO
