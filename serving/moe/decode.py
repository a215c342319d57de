"""Numbers inside the kernels: int4 to e4m3 without a table, scales from their pairs, absolute maxima to FP8 scales.

e4m3's smallest codes count in steps of 2^-9: code q is q * 2^-9 for q from 0 to 8. So an int4's magnitude is its own
e4m3 code, and the factor 512 that is missing is put into the activations' scale, once a token (`UNIT`).
"""

import os

import triton
import triton.language as tl

from lightship import w4afp8

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
UNIT = tl.constexpr(512.0)
"""What a decoded weight has to be multiplied by."""
FP8_MAX = tl.constexpr(w4afp8.FP8_MAX)
LEAST = tl.constexpr(w4afp8.LEAST_AMAX)


@triton.jit
def expand(packed):
    """Packed int8 [...] (see `packing`) -> (e4m3 of the low nibbles, e4m3 of the high ones), in units of 1 / UNIT.

    Four bytes a register: t is the signs, u the magnitudes, and each result is a magnitude with its sign in bit 7.
    """
    if INTERPRETED:
        low = packed & 15
        high = (packed >> 4) & 15
        low = ((low & 7) + (low >> 3)) | ((low >> 3) << 7)
        high = ((high & 7) + (high >> 3)) | ((high >> 3) << 7)
    else:
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 t, u, v, x;
            shr.b32 t, $2, 3;
            and.b32 t, t, 0x11111111;
            mad.lo.s32 u, t, -7, $2;
            shl.b32 v, t, 7;
            lop3.b32 $0, u, v, 0x0f0f0f0f, 0xe4;
            shl.b32 v, t, 3;
            shr.b32 x, u, 4;
            lop3.b32 $1, x, v, 0x0f0f0f0f, 0xe4;
            }""",
            "=r,=r,r",
            [packed],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    return low.to(tl.float8e4nv, bitcast=True), high.to(tl.float8e4nv, bitcast=True)


@triton.jit
def split_scales(pair):
    """int32 of two bf16 -> two float32."""
    return (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)


@triton.jit
def add_scaled(acc, product, scale, ORDERED: tl.constexpr):
    """acc + product * scale, float32. ORDERED: before the next product's instructions, not all at the loop's end."""
    if INTERPRETED or not ORDERED:
        return acc + product * scale
    return tl.inline_asm_elementwise(
        "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [product, scale, acc], dtype=tl.float32, is_pure=False, pack=1
    )


@triton.jit
def to_fp8(x, inverse):
    """x * inverse in e4m3, to nearest, saturating."""
    x = x * inverse
    if INTERPRETED:  # compiled, the conversion saturates and rounds; the interpreter cuts off what does not fit
        x = tl.minimum(tl.maximum(x, -FP8_MAX), FP8_MAX)
        bits = x.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        x = tl.where(tl.abs(x) < 0.015625, (x + 24576.0) - 24576.0, normal)
    return x.to(tl.float8e4nv)
