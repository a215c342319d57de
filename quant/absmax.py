"""Absmax rounding: each group's largest weight becomes ±7. The baseline that every other method must beat."""

import torch

from lightship.quant.rounding import Int4Weight, group_amax, round_with_scales
from lightship.w4afp8 import INT4_MAX


def round_absmax(w_OI: torch.Tensor, hessian_II: torch.Tensor | None = None) -> Int4Weight:  # noqa: ARG001
    """Round w_OI float32 [out, in] with scale amax / 7 a group of 128; the Hessian is not used."""
    return round_with_scales(w_OI, (group_amax(w_OI) / INT4_MAX).bfloat16())
