"""Before the matrix products: activations to FP8, and the (token, expert) pairs in the order of their experts.

Sorting is by counting and is stable, so the order, and with it every sum, depends on the input alone. No number comes
back to the host: grids have the size of the worst routing, and what is not needed ends at once.

Pairs whose expert is not one of this rank's (-1, or anything outside 0 to E - 1) are left out.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from lightship.serving.moe.decode import FP8_MAX, LEAST, UNIT, to_fp8

CHUNKS = (512, 2048, 4096)
"""Pairs that a program looks at together: the least that takes all, or else the last."""


@dataclass(frozen=True)
class Routed:
    """The sorted pairs, and the tiles of up to `block_m` of them, of one expert each, that the products work on.

    pair_P int32: the pairs by expert, of which only this rank's are set. tile_expert, tile_start, tile_end int32
    [tiles]: expert (-1: nothing to do) and the range of its rows.
    """

    pair_P: torch.Tensor
    tile_expert: torch.Tensor
    tile_start: torch.Tensor
    tile_end: torch.Tensor


def most_tiles(pairs: int, experts: int, block_m: int) -> int:
    """The number of tiles that no routing exceeds."""
    return min(pairs, experts) + pairs // block_m


def quantize(x_TH: torch.Tensor, input_scale: torch.Tensor | None, scale_T: torch.Tensor, q_TH: torch.Tensor) -> None:
    """x_TH bf16 to e4m3 by token, or by `input_scale`, into q_TH; scale_T undoes it, and the weights' unit."""
    tokens, hidden = x_TH.shape
    _prepare[(tokens,)](
        x_TH, input_scale, q_TH, scale_T, x_TH.stride(0), None, None, None, None, None, 0, 0, HIDDEN=hidden,
        WIDTH=triton.next_power_of_2(hidden), EXPERTS=0, CHUNK=0, ONCE=True, BLOCK_M=16, num_warps=8,
    )  # fmt: skip


def quantize_and_sort(
    x_TH: torch.Tensor,
    input_scale: torch.Tensor | None,
    scale_T: torch.Tensor,
    q_TH: torch.Tensor,
    experts_TK: torch.Tensor,
    experts: int,
    block_m: int,
) -> Routed:
    """As `quantize`, and the pairs of experts_TK by expert, in the same launch."""
    (tokens, hidden), pairs = x_TH.shape, experts_TK.numel()
    tiles = most_tiles(pairs, experts, block_m)
    table = torch.empty(3 * tiles + pairs, dtype=torch.int32, device=x_TH.device)
    routed = Routed(table[3 * tiles :], *table[: 3 * tiles].view(3, tiles))
    chunk = next((c for c in CHUNKS if pairs <= c), CHUNKS[-1])
    _prepare[(experts + tokens,)](
        x_TH, input_scale, q_TH, scale_T, x_TH.stride(0), experts_TK, routed.pair_P, routed.tile_expert,
        routed.tile_start, routed.tile_end, pairs, tiles, HIDDEN=hidden,
        WIDTH=triton.next_power_of_2(hidden), EXPERTS=experts, CHUNK=chunk, ONCE=pairs <= chunk,
        BLOCK_M=block_m, num_warps=8,
    )  # fmt: skip
    return routed


@triton.jit(do_not_specialize=["pairs", "tiles"])
def _prepare(
    x_ptr, input_scale_ptr, q_ptr, scale_ptr, x_stride, experts_ptr, pair_ptr, tile_expert_ptr, tile_start_ptr,
    tile_end_ptr, pairs, tiles, HIDDEN: tl.constexpr, WIDTH: tl.constexpr, EXPERTS: tl.constexpr, CHUNK: tl.constexpr,
    ONCE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The first EXPERTS programs each collect the pairs of one expert; each of the others quantizes a token."""
    program = tl.program_id(0)
    if program >= EXPERTS:
        _quantize_token(x_ptr, input_scale_ptr, q_ptr, scale_ptr, program - EXPERTS, x_stride, HIDDEN, WIDTH)
    elif EXPERTS > 0:
        start, count = _count(experts_ptr, pairs, program, CHUNK, ONCE)
        _list_tiles(tile_expert_ptr, tile_start_ptr, tile_end_ptr, tiles, program, start, count, EXPERTS, BLOCK_M)
        _place(experts_ptr, pair_ptr, pairs, program, start, CHUNK, ONCE)


@triton.jit
def _quantize_token(
    x_ptr, input_scale_ptr, q_ptr, scale_ptr, token, x_stride, HIDDEN: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """`WIDTH`: the power of two that holds HIDDEN, from the host: SGLang puts its own in Triton's place."""
    column = tl.arange(0, WIDTH)
    inside = column < HIDDEN
    x = tl.load(x_ptr + token.to(tl.int64) * x_stride + column, mask=inside, other=0.0)
    if input_scale_ptr is None:
        scale = tl.maximum(tl.max(tl.abs(x), axis=0).to(tl.float32), LEAST) / FP8_MAX
    else:
        scale = tl.load(input_scale_ptr)
    tl.store(q_ptr + token.to(tl.int64) * HIDDEN + column, to_fp8(x.to(tl.float32), 1 / scale), mask=inside)
    tl.store(scale_ptr + token, scale * UNIT)


@triton.jit
def _load_experts(experts_ptr, pairs, start, CHUNK: tl.constexpr):
    """CHUNK pairs from `start`: (their numbers, their experts, -1 beyond the end)."""
    pair = start + tl.arange(0, CHUNK)
    return pair, tl.load(experts_ptr + pair, mask=pair < pairs, other=-1).to(tl.int32)


@triton.jit
def _count(experts_ptr, pairs, expert, CHUNK: tl.constexpr, ONCE: tl.constexpr):
    """(pairs of the experts before this one, pairs of this one)."""
    before = tl.zeros((CHUNK,), tl.int32)
    own = tl.zeros((CHUNK,), tl.int32)
    if ONCE:
        _, found = _load_experts(experts_ptr, pairs, 0, CHUNK)
        before += ((found >= 0) & (found < expert)).to(tl.int32)
        own += (found == expert).to(tl.int32)
    else:
        for start in range(0, pairs, CHUNK):
            _, found = _load_experts(experts_ptr, pairs, start, CHUNK)
            before += ((found >= 0) & (found < expert)).to(tl.int32)
            own += (found == expert).to(tl.int32)
    return tl.sum(before, axis=0), tl.sum(own, axis=0)


@triton.jit
def _place(experts_ptr, pair_ptr, pairs, expert, first, CHUNK: tl.constexpr, ONCE: tl.constexpr):
    """Write the expert's pairs, in their order, from place `first` on."""
    if ONCE:
        _place_chunk(experts_ptr, pair_ptr, pairs, 0, expert, first, CHUNK)
    else:
        for start in range(0, pairs, CHUNK):
            first += _place_chunk(experts_ptr, pair_ptr, pairs, start, expert, first, CHUNK)


@triton.jit
def _place_chunk(experts_ptr, pair_ptr, pairs, start, expert, first, CHUNK: tl.constexpr):
    pair, found = _load_experts(experts_ptr, pairs, start, CHUNK)
    own = found == expert
    upto = tl.cumsum(own.to(tl.int32), axis=0)
    tl.store(pair_ptr + first + upto - 1, pair, mask=own)
    return tl.sum(own.to(tl.int32), axis=0)


@triton.jit
def _list_tiles(
    tile_expert_ptr, tile_start_ptr, tile_end_ptr, tiles, expert, start, count, EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Write the expert's tiles, and -1 up to where the next expert's begin.

    An expert's tiles begin where they would if each expert before it had a tile more than its rows fill, but no more
    such experts than rows: that depends on `start` alone, leaves enough room, and stays below `most_tiles`.
    """
    first = start // BLOCK_M + tl.minimum(expert, start)
    end = start + count
    beyond = end // BLOCK_M + tl.minimum(expert + 1, end)
    if expert == EXPERTS - 1:
        beyond = tiles
    for tile_0 in range(first, beyond, 64):
        tile = tile_0 + tl.arange(0, 64)
        row = start + (tile - first) * BLOCK_M
        inside = tile < beyond
        tl.store(tile_expert_ptr + tile, tl.where(row < end, expert, -1), mask=inside)
        tl.store(tile_start_ptr + tile, row, mask=inside)
        tl.store(tile_end_ptr + tile, tl.minimum(row + BLOCK_M, end), mask=inside)
