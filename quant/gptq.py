"""GPTQ: round a weight column by column and let the columns not yet rounded make up for the error.

The inputs that calibration saw say which errors matter: H = sum of x xᵀ. Frantar et al., "GPTQ: Accurate
Post-Training Quantization for Generative Pre-trained Transformers", arXiv 2210.17323. Columns go in the order of
falling H diagonal, so that the inputs that matter most are rounded while many others can still compensate; each keeps
the scale of the group in which it lies in memory, chosen beforehand by the MSE grid. There an input's weight counts by
1 / diag(H⁻¹), which is what an error of its column costs after all the others have made up for it.

Afterwards, if asked, `descent.py` goes over the columns again.
"""

import torch

from lightship.quant.descent import descend
from lightship.quant.mse import best_scales, round_mse
from lightship.quant.rounding import Int4Weight, runs_triton
from lightship.w4afp8 import GROUP, INT4_MAX, INT4_MIN

BLOCKS = (128, 16)
"""Columns after which the compensation is carried over to all that are left, and to those that are left of the 128."""

SMALL = 1024
"""Triangles up to this size are inverted by one solve; larger ones by halves, which is matrix products for the most."""


def round_gptq(
    w_OI: torch.Tensor,
    hessian_II: torch.Tensor | None,
    *,
    signed: bool = True,
    damping: float = 0.01,
    sweeps: int = 0,
) -> Int4Weight:
    """Round w_OI float32 [out, in] against hessian_II float32 [in, in]; without a Hessian, as `round_mse`."""
    if hessian_II is None:
        return round_mse(w_OI, signed=signed)
    order_I = hessian_II.diagonal().argsort(descending=True, stable=True)
    place_I = order_I.argsort()
    damped_II, upper_II = factor(hessian_II.index_select(0, order_I).index_select(1, order_I), damping)
    weight_I = 1 / upper_II.square().sum(dim=0)
    scale_OG = best_scales(w_OI, signed=signed, weight_I=weight_I[place_I])
    group_I = order_I // GROUP
    w_OI = w_OI[:, order_I]
    q_OI = round_columns(w_OI, scale_OG, group_I, upper_II)
    if sweeps:
        q_OI = descend(w_OI, q_OI, scale_OG, group_I, damped_II.float(), sweeps)
    return Int4Weight(q_OI[:, place_I], scale_OG)


def factor(hessian_II: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The damped Hessian, float64, and U of `inverse_cholesky`.

    A sum in float32 over inputs that all point one way can have eigenvalues below zero by more than the damping; it is
    damped ten times as much then, until it has none.
    """
    while True:
        damped_II = damp(hessian_II, damping)
        try:
            return damped_II, inverse_cholesky(damped_II)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            assert damping < 1000
            damping *= 10


def damp(hessian_II: torch.Tensor, damping: float) -> torch.Tensor:
    """float64 copy [..., in, in] with `damping` times the mean diagonal added to the diagonal.

    Inputs that were always zero get a diagonal of the mean, so they neither give nor take compensation.
    """
    damped_II = hessian_II.double()
    diagonal_I = damped_II.diagonal(dim1=-2, dim2=-1)
    mean = diagonal_I.mean(dim=-1, keepdim=True).clamp_min(1e-30)
    extra_I = damping * mean + torch.where(diagonal_I == 0, mean, 0.0)
    return damped_II + torch.diag_embed(extra_I)


def inverse_cholesky(damped_II: torch.Tensor) -> torch.Tensor:
    """Upper U with H⁻¹ = UᵀU, float32 [..., in, in], of a positive definite H, float64.

    With P the reversal of the order, PHP = LLᵀ gives H = (PLP)(PLP)ᵀ with PLP upper triangular, so U is its inverse:
    one factorization and one triangular inverse, and H⁻¹ itself is never formed.
    """
    lower_II = torch.linalg.cholesky(damped_II.flip(-2, -1))
    return _invert_upper(lower_II.flip(-2, -1)).float()


def _invert_upper(upper_II: torch.Tensor) -> torch.Tensor:
    size = upper_II.shape[-1]
    if size <= SMALL:
        one_II = torch.eye(size, dtype=upper_II.dtype, device=upper_II.device).expand_as(upper_II)
        return torch.linalg.solve_triangular(upper_II, one_II, upper=True).triu_()
    half = size // 2
    inverse_II = torch.zeros_like(upper_II)
    first_II, last_II = _invert_upper(upper_II[..., :half, :half]), _invert_upper(upper_II[..., half:, half:])
    inverse_II[..., :half, :half], inverse_II[..., half:, half:] = first_II, last_II
    inverse_II[..., :half, half:] = (first_II @ upper_II[..., :half, half:] @ last_II).neg_()
    return inverse_II


def round_columns(
    w_OI: torch.Tensor, scale_OG: torch.Tensor, group_I: torch.Tensor, upper_II: torch.Tensor
) -> torch.Tensor:
    """Round the columns of w_OI float32 from first to last, each compensated by those after it.

    Args:
        scale_OG: bf16 [out, groups].
        group_I: int64 [in], which of the scales a column has.
        upper_II: float32, from `inverse_cholesky`.

    Returns:
        int8 [out, in].
    """
    if runs_triton(w_OI):
        from lightship.quant.gptq_triton import round_columns as round_columns_on_gpu

        return round_columns_on_gpu(w_OI, scale_OG, group_I, upper_II)
    q_IO, _ = _round_rows(w_OI.T.contiguous(), scale_OG.float().T[group_I], upper_II)
    return q_IO.T.to(torch.int8)


def _round_rows(
    w_IO: torch.Tensor, scale_IO: torch.Tensor, upper_II: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round the transposed weight's rows in order; returns them, and each one's error over its diagonal.

    In blocks of blocks: the rows after a block are compensated for all of it at once.
    """
    q_IO, error_IO = torch.empty_like(w_IO), torch.empty_like(w_IO)
    size = next((size for size in BLOCKS if size < len(w_IO)), None)
    if size is None:
        for i, (w_O, scale_O, upper_I) in enumerate(zip(w_IO, scale_IO, upper_II, strict=True)):
            q_IO[i] = (w_O / scale_O).round_().clamp_(INT4_MIN, INT4_MAX)
            error_IO[i] = (w_O - q_IO[i] * scale_O).div_(upper_I[i])
            w_IO[i + 1 :].addr_(upper_I[i + 1 :], error_IO[i], alpha=-1)
        return q_IO, error_IO
    for start in range(0, len(w_IO), size):
        block = slice(start, start + size)
        q_IO[block], error_IO[block] = _round_rows(w_IO[block], scale_IO[block], upper_II[block, block])
        w_IO[block.stop :].addmm_(upper_II[block, block.stop :].T, error_IO[block], alpha=-1)
    return q_IO, error_IO
