"""The number formats, as pure tensor functions: int4 packing, group scales, FP8 blocks, FP8 activations.

Everything that reads or writes a checkpoint and every reference kernel uses these and nothing else, so a format
question has one answer. Shape suffixes: O output features, I input features, T tokens, G groups of 128 along the input.

    int4   w_OI = q_OI * scale_OG      q in [-8, 7], one bf16 scale for 128 consecutive inputs of one output
    fp8    w_OI = q_OI * scale_inv     q in e4m3, one fp32 scale for a 128 x 128 block
"""

import torch

GROUP = 128
"""Inputs that share an int4 scale, and the side of an FP8 block."""

FP8_MAX = 448.0
"""Largest finite float8_e4m3fn."""

LEAST_AMAX = 1e-12
"""The least absolute maximum that a scale is made of, so that zeros have one."""

INT4_MIN, INT4_MAX = -8, 7


def tensor_parallel_degrees(moe_intermediate_size: int) -> list[int]:
    """Degrees at which every shard of the experts is whole groups of 128, so that its scales are its own."""
    return [tp for tp in (1, 2, 4, 8, 16, 32) if moe_intermediate_size % (tp * GROUP) == 0]


def pack_int4(q_OI: torch.Tensor) -> torch.Tensor:
    """Pack int4 values two a byte along the input dimension; the even input is the low nibble.

    Args:
        q_OI: int8 [out, in] with values in [-8, 7]; `in` is even.

    Returns:
        int8 [out, in / 2], two's complement nibbles.
    """
    assert q_OI.dtype == torch.int8
    assert q_OI.shape[-1] % 2 == 0
    low, high = q_OI[..., 0::2], q_OI[..., 1::2]
    return (high << 4) | (low & 0x0F)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of `pack_int4`: int8 [out, in / 2] -> int8 [out, in] with values in [-8, 7]."""
    assert packed.dtype == torch.int8
    low = (packed << 4) >> 4
    high = packed >> 4
    return torch.stack((low, high), dim=-1).flatten(-2)


def dequantize_int4(packed: torch.Tensor, scale_OG: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Packed int8 [out, in / 2] and scales [out, in / 128] -> weights [out, in] in `dtype`."""
    q_OGg = unpack_int4(packed).unflatten(-1, (-1, GROUP)).to(dtype)
    return (q_OGg * scale_OG.to(dtype)[..., None]).flatten(-2)


def expand_blocks(scale_inv: torch.Tensor, out_features: int, in_features: int) -> torch.Tensor:
    """FP8 block scales [ceil(out / 128), ceil(in / 128)] -> one scale an element, [out, in]."""
    rows = scale_inv.repeat_interleave(GROUP, dim=0)[:out_features]
    return rows.repeat_interleave(GROUP, dim=1)[:, :in_features]


def dequantize_fp8_blocks(
    q_OI: torch.Tensor, scale_inv: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """FP8 e4m3 [out, in] and fp32 block scales -> weights [out, in] in `dtype`."""
    return q_OI.to(dtype) * expand_blocks(scale_inv.to(dtype), *q_OI.shape)


def quantize_fp8_blocks(w_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [out, in] -> (e4m3 [out, in], fp32 scales [ceil(out / 128), ceil(in / 128)]), DeepSeek's format."""
    out_features, in_features = w_OI.shape
    padded = torch.nn.functional.pad(w_OI.float(), (0, -in_features % GROUP, 0, -out_features % GROUP))
    blocks = padded.unflatten(0, (-1, GROUP)).unflatten(-1, (-1, GROUP))
    scale_inv = blocks.abs().amax(dim=(1, 3)).clamp_min(LEAST_AMAX) / FP8_MAX
    q_OI = (w_OI.float() / expand_blocks(scale_inv, out_features, in_features)).to(torch.float8_e4m3fn)
    return q_OI, scale_inv


def round_through_fp8(x: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """x -> e4m3(x / scale) * scale, saturating at ±448, in x's dtype: what an FP8 matrix unit sees of x."""
    return (x / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).to(x.dtype) * scale


def token_scales(amax_T1: torch.Tensor) -> torch.Tensor:
    """Dynamic FP8 scales from absolute maxima; a row of zeros gets a harmless scale."""
    return amax_T1.clamp_min(LEAST_AMAX) / FP8_MAX


def round_groups_through_fp8(x_TI: torch.Tensor) -> torch.Tensor:
    """Dynamic FP8 with one scale a token and 128 inputs: the activations of the FP8 block format.

    x_TI: [..., in] with any `in` (a last group may be shorter); returns the same shape and dtype.
    """
    in_features = x_TI.shape[-1]
    groups = torch.nn.functional.pad(x_TI, (0, -in_features % GROUP)).unflatten(-1, (-1, GROUP))
    rounded = round_through_fp8(groups, token_scales(groups.abs().amax(dim=-1, keepdim=True)))
    return rounded.flatten(-2)[..., :in_features]
