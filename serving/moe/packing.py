"""The layout in which the kernels read int4 weights, made once from the checkpoint's.

The checkpoint has two consecutive inputs a byte. Here a byte has the same input of two consecutive groups of 128, low
nibble first, and the weights of a pair of groups lie together for all outputs: [E, G/2, N, 128 bytes]. So a tile is
contiguous, and one load feeds two matrix products, each of one group and one scale. A last odd group is filled up with
zeros.

A nibble holds its sign in the highest bit, and below it q, or -q - 1 if negative: from there an e4m3 number costs one
shift, one and, one multiply-add and two selections for four values (see `decode.expand`).

Scales: [E, G/2, N] int32, two bf16 in each, the first group's in the low half.
"""

import torch

from lightship.w4afp8 import GROUP, unpack_int4

CHUNK_BYTES = 1 << 26
"""Packed weights that are rewritten at a time; a few times as much is needed beside them."""


def pack_weights(packed_ENi: torch.Tensor) -> torch.Tensor:
    """int8 [E, N, in / 2] as the checkpoint packs them -> int8 [E, ceil(in / 256), N, 128].

    The result takes the place of the input where `in` is a multiple of 256, and is new where it is not.
    """
    experts, outputs, inputs = packed_ENi.shape[0], packed_ENi.shape[1], packed_ENi.shape[2] * 2
    pairs = -(-inputs // (2 * GROUP))
    assert packed_ENi.is_contiguous()
    in_place = inputs % (2 * GROUP) == 0
    shape = (experts, pairs, outputs, GROUP)
    packed = packed_ENi.view(shape) if in_place else packed_ENi.new_empty(shape)
    step = max(1, CHUNK_BYTES // (outputs * pairs * GROUP))
    for start in range(0, experts, step):
        part = slice(start, start + step)
        packed[part] = _pack(packed_ENi[part], pairs)
    return packed


def _pack(packed_ENi: torch.Tensor, pairs: int) -> torch.Tensor:
    nibbles = unpack_int4(packed_ENi).bitwise_and_(15)
    nibbles = torch.nn.functional.pad(nibbles, (0, pairs * 2 * GROUP - nibbles.shape[-1]))
    nibbles ^= (nibbles >> 3) * 7
    nibbles = nibbles.unflatten(-1, (pairs, 2, GROUP))
    return (nibbles[..., 0, :] | (nibbles[..., 1, :] << 4)).transpose(1, 2)


def pack_scales(scale_ENG: torch.Tensor) -> torch.Tensor:
    """bf16 [E, N, G] -> int32 [E, ceil(G / 2), N]."""
    assert scale_ENG.dtype == torch.bfloat16
    padded = torch.nn.functional.pad(scale_ENG, (0, scale_ENG.shape[-1] % 2)).contiguous()
    return padded.view(torch.int32).transpose(1, 2).contiguous()
