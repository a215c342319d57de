"""MSE-grid rounding: for each group, the scale of a grid that makes the squared rounding error smallest.

Clipping the largest weight a little costs less than a coarse step for the other 127. A signed scale turns the
asymmetric int4 range [-8, 7] around, so that -8 serves the group's extreme whatever its sign.

The grid is scale = amax / divisor. First every COARSE divisor is tried, then those that lie FINE steps beside
the best. Against all 52 divisors from 6.8 to 11.9 that adds 0.05 % to the error on Gaussian weights for a third of the
work. Both signs cost one pass: -scale is scale with the ends of int4 swapped, so the errors differ only where
|w| > 7.5 scale, where one end is a step nearer than the other.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from lightship.quant.rounding import Int4Weight, group_amax, round_with_scales, runs_triton
from lightship.w4afp8 import GROUP, INT4_MAX, dequantize_fp8_blocks, pack_int4

COARSE_FIRST, COARSE_STEP, COARSE_COUNT = 6.75, 0.375, 15
"""7 maps the extreme to ±7; beyond 8 the extreme is clipped; 12 is the last."""

FINE = (-0.125, -0.0625, 0.0625, 0.125)

CHUNK = {"cpu": 1 << 18, "cuda": 1 << 25}
"""Weights at a time: what a core's cache holds, or what keeps a GPU busy."""


def round_mse(w_OI: torch.Tensor, hessian_II: torch.Tensor | None = None, *, signed: bool = True) -> Int4Weight:  # noqa: ARG001
    """Round w_OI float32 [out, in] at the best scale of the grid a group; the Hessian is not used."""
    return round_with_scales(w_OI, best_scales(w_OI, signed=signed))


def quantize_fp8_blocks_mse(
    q_OI: torch.Tensor, scale_inv: torch.Tensor, *, signed: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 blocks straight to packed int4, as `round_mse` of the dequantized weight: one kernel on a GPU.

    Args:
        q_OI: e4m3 [out, in]; stacked experts may be flattened to it if each one's `out` is a multiple of 128.
        scale_inv: float32 [ceil(out / 128), in / 128].

    Returns:
        packed int8 [out, in / 2] and scales bf16 [out, in / 128].
    """
    if runs_triton(q_OI):
        from lightship.quant.mse_triton import quantize_fp8_blocks

        return quantize_fp8_blocks(q_OI, scale_inv, signed=signed)
    rounded = round_mse(dequantize_fp8_blocks(q_OI, scale_inv), signed=signed)
    return pack_int4(rounded.q_OI), rounded.scale_OG


def best_scales(w_OI: torch.Tensor, *, signed: bool, weight_I: torch.Tensor | None = None) -> torch.Tensor:
    """bf16 scales [out, in / 128] of least squared error, each judged after it was rounded to bf16.

    weight_I: float32 [in], how much the squared error of each input's weight counts; all the same if absent.
    """
    if runs_triton(w_OI):
        from lightship.quant.mse_triton import best_scales as best_scales_on_gpu

        return best_scales_on_gpu(w_OI, signed=signed, weight_I=weight_I)
    weight_Gg = None if weight_I is None else weight_I.unflatten(0, (-1, GROUP))
    rows = max(1, CHUNK.get(w_OI.device.type, 1 << 25) // w_OI.shape[-1])
    search = partial(_search, weight_Gg=weight_Gg, signed=signed)
    if w_OI.device.type != "cpu":
        return torch.cat([search(w_rI) for w_rI in w_OI.split(rows)])
    # A core a chunk: shared among the cores, its many short steps would mostly wait for one another.
    with ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,)) as cores:
        return torch.cat(list(cores.map(search, w_OI.split(rows))))


def _search(w_OI: torch.Tensor, *, weight_Gg: torch.Tensor | None, signed: bool) -> torch.Tensor:
    w_OGg = w_OI.unflatten(-1, (-1, GROUP))
    magnitude_OGg = w_OGg.abs()
    amax_OG = group_amax(w_OI)
    best_OG = torch.empty_like(amax_OG)
    best_divisor_OG = torch.empty_like(amax_OG)
    least_OG = torch.full_like(amax_OG, torch.inf)

    def attempt(divisor_OG: torch.Tensor) -> None:
        scale_OG = (amax_OG / divisor_OG).bfloat16().float()
        error_OG, negative_OG = _errors(w_OGg, magnitude_OGg, scale_OG, weight_Gg)
        if signed:
            scale_OG = torch.where(negative_OG < error_OG, -scale_OG, scale_OG)
            error_OG = torch.minimum(error_OG, negative_OG)
        better_OG = error_OG < least_OG
        for kept, new in ((least_OG, error_OG), (best_OG, scale_OG), (best_divisor_OG, divisor_OG)):
            kept.copy_(torch.where(better_OG, new, kept))

    for step in range(COARSE_COUNT):
        attempt(torch.full_like(amax_OG, COARSE_FIRST + step * COARSE_STEP))
    coarse_OG = best_divisor_OG.clone()
    for offset in FINE:
        attempt(coarse_OG + offset)
    return best_OG.bfloat16()


def _errors(
    w_OGg: torch.Tensor, magnitude_OGg: torch.Tensor, scale_OG: torch.Tensor, weight_Gg: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared errors [out, groups] of rounding at scale_OG > 0, and at -scale_OG.

    With both ends at 8 the error is the same for both signs. The end at 7 adds (a - 7s)² - (a - 8s)² = 2s(a - 7.5s) for
    each a = |w| > 7.5s on its side: the positive one at +scale, the negative one at -scale.
    """
    scale_OG1 = scale_OG[..., None]
    q_OGg = (magnitude_OGg * (1 / scale_OG1)).round_().clamp_(max=INT4_MAX + 1)
    square_OGg = torch.sub(magnitude_OGg, q_OGg.mul_(scale_OG1), out=q_OGg).square_()
    above_OGg = (w_OGg - 7.5 * scale_OG1).clamp_(min=0)
    below_OGg = (-7.5 * scale_OG1 - w_OGg).clamp_(min=0)
    if weight_Gg is not None:
        for term_OGg in (square_OGg, above_OGg, below_OGg):
            term_OGg.mul_(weight_Gg)
    both_OG = square_OGg.sum(dim=-1)
    return both_OG + 2 * scale_OG * above_OGg.sum(dim=-1), both_OG + 2 * scale_OG * below_OGg.sum(dim=-1)
