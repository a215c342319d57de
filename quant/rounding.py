"""The rounding methods and their one interface: a float weight, and perhaps its Hessian, to int4 and group scales.

A method works where its tensors are, on a CPU or a GPU, and leaves its result there. Weights that share their inputs
(gate and up of an expert) are best stacked along the output dimension, so that one Hessian is factored once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib.util import find_spec
from typing import NamedTuple

import torch

from lightship.recipe import RoundingSettings
from lightship.w4afp8 import GROUP, INT4_MAX, INT4_MIN, LEAST_AMAX


class Int4Weight(NamedTuple):
    """q_OI int8 [out, in] in [-8, 7] and scale_OG bf16 [out, in / 128]: w_OI is about q_OI * scale_OG."""

    q_OI: torch.Tensor
    scale_OG: torch.Tensor


Rounding = Callable[[torch.Tensor, torch.Tensor | None], Int4Weight]
"""(w_OI float32 [out, in], hessian_II float32 [in, in] = sum of x xᵀ over the inputs seen, or None) -> Int4Weight."""


def rounding_for(settings: RoundingSettings) -> Rounding:
    """The method that a recipe, or one of its rules, asks for."""
    from lightship.quant.absmax import round_absmax
    from lightship.quant.gptq import round_gptq
    from lightship.quant.mse import round_mse

    match settings.method:
        case "absmax":
            return round_absmax
        case "mse":
            return partial(round_mse, signed=settings.signed_scales)
        case "gptq":
            return partial(round_gptq, signed=settings.signed_scales, damping=settings.damping, sweeps=settings.sweeps)


def round_with_scales(w_OI: torch.Tensor, scale_OG: torch.Tensor) -> Int4Weight:
    """Nearest int4 at given scales."""
    q_OGg = (w_OI.unflatten(-1, (-1, GROUP)) / scale_OG.float()[..., None]).round_().clamp_(INT4_MIN, INT4_MAX)
    return Int4Weight(q_OGg.flatten(-2).to(torch.int8), scale_OG)


def restore(rounded: Int4Weight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weight [out, in] in `dtype` that a rounded one stands for."""
    return (rounded.q_OI.unflatten(-1, (-1, GROUP)) * rounded.scale_OG.to(dtype)[..., None]).flatten(-2)


def group_amax(w_OI: torch.Tensor) -> torch.Tensor:
    """Absolute maximum of each group [out, in / 128], at least LEAST_AMAX so that a group of zeros has a scale."""
    return w_OI.unflatten(-1, (-1, GROUP)).abs().amax(dim=-1).clamp_min(LEAST_AMAX)


def relative_error(w_OI: torch.Tensor, rounded: Int4Weight) -> float:
    """||w - w'||² / ||w||²."""
    return float((w_OI - restore(rounded)).square().sum() / w_OI.square().sum().clamp_min(1e-30))


def output_error(w_OI: torch.Tensor, rounded: Int4Weight, hessian_II: torch.Tensor) -> float:
    """||x w' - x w||² / ||x w||² over the inputs x of which hessian_II = sum of x xᵀ; 0 if the outputs are all zero."""
    error_OI = w_OI - restore(rounded)
    with tensor_cores(True):
        lost = ((error_OI @ hessian_II) * error_OI).sum(dtype=torch.float64)
        return float(lost / ((w_OI @ hessian_II) * w_OI).sum(dtype=torch.float64).clamp_min(1e-30))


@contextmanager
def tensor_cores(allowed: bool) -> Iterator[None]:
    """Let a GPU's tensor cores round the inputs of float32 products to TF32, ten bits of mantissa, or not."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def runs_triton(tensor: torch.Tensor) -> bool:
    """Whether the Triton kernels serve this tensor; plain torch does the same, slower, where they do not."""
    return tensor.is_cuda and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
