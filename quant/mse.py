"""MSE-grid rounding: for each group, the scale of a grid that makes the squared rounding error smallest.

Clipping the largest weight a little costs less than a coarse step for the other 127. A signed scale turns the
asymmetric int4 range [-8, 7] around, so that -8 serves the group's extreme whatever its sign.
"""

import torch

from lightship.quant.rounding import Int4Weight, group_amax, round_with_scales
from lightship.w4afp8 import GROUP, INT4_MAX, INT4_MIN

DIVISORS = torch.arange(6.8, 12.0, 0.1)
"""The grid: scale = amax / divisor. 7 maps the extreme to ±7; beyond 8 the extreme is clipped."""


def round_mse(w_OI: torch.Tensor, hessian_II: torch.Tensor | None = None, *, signed: bool = True) -> Int4Weight:  # noqa: ARG001
    """Round w_OI float32 [out, in] at the best scale of the grid a group; the Hessian is not used."""
    return round_with_scales(w_OI, best_scales(w_OI, signed=signed))


def best_scales(w_OI: torch.Tensor, *, signed: bool) -> torch.Tensor:
    """bf16 scales [out, in / 128] of least squared error, each judged after it was rounded to bf16."""
    w_OGg = w_OI.unflatten(-1, (-1, GROUP))
    amax_OG = group_amax(w_OI)
    best_OG = torch.empty_like(amax_OG, dtype=torch.bfloat16)
    least_OG = torch.full_like(amax_OG, torch.inf)
    for divisor in DIVISORS.tolist():
        for sign in (1.0, -1.0) if signed else (1.0,):
            scale_OG = (amax_OG * (sign / divisor)).bfloat16()
            step_OG1 = scale_OG.float()[..., None]
            q_OGg = (w_OGg / step_OG1).round_().clamp_(INT4_MIN, INT4_MAX)
            error_OG = (w_OGg - q_OGg * step_OG1).square_().sum(dim=-1)
            better_OG = error_OG < least_OG
            least_OG = torch.where(better_OG, error_OG, least_OG)
            best_OG = torch.where(better_OG, scale_OG, best_OG)
    return best_OG
