"""GPTQ: round a weight column by column and let the columns not yet rounded make up for the error.

The inputs that calibration saw say which errors matter: H = sum of x xᵀ. Frantar et al., "GPTQ: Accurate
Post-Training Quantization for Generative Pre-trained Transformers", arXiv 2210.17323. Columns go in the order of
falling H diagonal, so that the inputs that matter most are rounded while many others can still compensate; each keeps
the scale of the group in which it lies in memory, chosen beforehand by the MSE grid.
"""

import torch

from lightship.quant.mse import best_scales, round_mse
from lightship.quant.rounding import Int4Weight
from lightship.w4afp8 import GROUP, INT4_MAX, INT4_MIN

BLOCK = 128
"""Columns after which the compensation is carried over to all columns that are left."""


def round_gptq(
    w_OI: torch.Tensor, hessian_II: torch.Tensor | None, *, signed: bool = True, damping: float = 0.01
) -> Int4Weight:
    """Round w_OI float32 [out, in] against hessian_II float32 [in, in]; without a Hessian, as `round_mse`."""
    if hessian_II is None:
        return round_mse(w_OI, signed=signed)
    order_I = hessian_II.diagonal().argsort(descending=True, stable=True)
    upper_II = inverse_cholesky(hessian_II[order_I][:, order_I], damping)
    scale_OG = best_scales(w_OI, signed=signed)
    scale_IO = scale_OG.float().repeat_interleave(GROUP, dim=1)[:, order_I].T.contiguous()
    w_IO = w_OI[:, order_I].T.contiguous()
    q_IO = torch.empty_like(w_IO)
    for start in range(0, len(w_IO), BLOCK):
        block = slice(start, start + BLOCK)
        q_IO[block], error_bO = _round_block(w_IO[block], scale_IO[block], upper_II[block, block])
        w_IO[block.stop :] -= upper_II[block, block.stop :].T @ error_bO
    q_OI = torch.empty(w_OI.shape, dtype=torch.int8)
    q_OI[:, order_I] = q_IO.T.to(torch.int8)
    return Int4Weight(q_OI, scale_OG)


def inverse_cholesky(hessian_II: torch.Tensor, damping: float) -> torch.Tensor:
    """Upper Cholesky factor of the inverse of the damped Hessian, float32 [in, in]; computed in float64.

    Inputs that were always zero get a diagonal of the mean, so they neither give nor take compensation.
    """
    hessian_II = hessian_II.double()
    diagonal_I = hessian_II.diagonal()
    mean = diagonal_I.mean().clamp_min(1e-30)
    extra_I = damping * mean + torch.where(diagonal_I == 0, mean, 0.0)
    inverse_II: torch.Tensor = torch.cholesky_inverse(torch.linalg.cholesky(hessian_II + extra_I.diag()))
    return torch.linalg.cholesky(inverse_II, upper=True).float()


def _round_block(
    w_bO: torch.Tensor, scale_bO: torch.Tensor, upper_bb: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a block's columns in order, compensating within it; returns them and each one's error over its diagonal."""
    q_bO, error_bO = torch.empty_like(w_bO), torch.empty_like(w_bO)
    for i, (w_O, scale_O) in enumerate(zip(w_bO, scale_bO, strict=True)):
        q_bO[i] = (w_O / scale_O).round().clamp(INT4_MIN, INT4_MAX)
        error_bO[i] = (w_O - q_bO[i] * scale_O) / upper_bb[i, i]
        w_bO[i + 1 :] -= torch.outer(upper_bb[i, i + 1 :], error_bO[i])
    return q_bO, error_bO
