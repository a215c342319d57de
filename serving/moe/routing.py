"""Before the matrix products: activations to FP8, and the (token, expert) pairs in the order of their experts.

Sorting is by counting and is stable, so the order, and with it every sum, depends on the input alone. No number comes
back to the host: grids have the size of the worst routing, and what is not needed ends at once.

Pairs whose expert is not one of this rank's (-1, or anything outside 0 to E - 1) are left out.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lightship.serving.moe.decode import FP8_MAX, LEAST, UNIT, to_fp8
from lightship.serving.moe.tuning import Plan

CHUNKS = (512, 2048, 4096)
"""Pairs that a program looks at together: the least that takes all, or else the last."""


class Tiles(NamedTuple):
    """An expert's rows in parts of a height or less, each int32 [tiles]: expert (-1: nothing to do), range of rows."""

    expert: torch.Tensor
    start: torch.Tensor
    end: torch.Tensor


@dataclass(frozen=True)
class Routed:
    """pair_P int32: the pairs by expert, of which only this rank's are set; and the tiles of each product."""

    pair_P: torch.Tensor
    gate_up: Tiles
    down: Tiles


def most_tiles(pairs: int, experts: int, block_m: int) -> int:
    """The number of tiles that no routing exceeds."""
    return min(pairs, experts) + pairs // block_m


def quantize(x_TH: torch.Tensor, input_scale: torch.Tensor | None, scale_T: torch.Tensor, q_TH: torch.Tensor) -> None:
    """x_TH bf16 to e4m3 by token, or by `input_scale`, into q_TH; scale_T undoes it, and the weights' unit."""
    tokens, hidden = x_TH.shape
    _prepare[(tokens,)](
        x_TH, input_scale, q_TH, scale_T, x_TH.stride(0), None, None, None, None, 0, 0, 0, HIDDEN=hidden,
        WIDTH=triton.next_power_of_2(hidden), EXPERTS=0, CHUNK=0, ONCE=True, GATE_UP_M=16, DOWN_M=16, num_warps=8,
    )  # fmt: skip


def quantize_and_sort(
    x_TH: torch.Tensor,
    input_scale: torch.Tensor | None,
    scale_T: torch.Tensor,
    q_TH: torch.Tensor,
    experts_TK: torch.Tensor,
    experts: int,
    plan: Plan,
) -> Routed:
    """As `quantize`, and the pairs of experts_TK by expert, with the tiles of both products, in the same launch."""
    (tokens, hidden), pairs = x_TH.shape, experts_TK.numel()
    gate_up_m, down_m = plan.gate_up.block_m, plan.down.block_m
    gate_ups, downs = most_tiles(pairs, experts, gate_up_m), most_tiles(pairs, experts, down_m)
    table = torch.empty(3 * (gate_ups + downs) + pairs, dtype=torch.int32, device=x_TH.device)
    first, second, pair_P = table.split((3 * gate_ups, 3 * downs, pairs))
    chunk = next((c for c in CHUNKS if pairs <= c), CHUNKS[-1])
    _prepare[(experts + tokens,)](
        x_TH, input_scale, q_TH, scale_T, x_TH.stride(0), experts_TK, pair_P, first, second, pairs, gate_ups, downs,
        HIDDEN=hidden, WIDTH=triton.next_power_of_2(hidden), EXPERTS=experts, CHUNK=chunk, ONCE=pairs <= chunk,
        GATE_UP_M=gate_up_m, DOWN_M=down_m, num_warps=8,
    )  # fmt: skip
    return Routed(pair_P, Tiles(*first.view(3, gate_ups)), Tiles(*second.view(3, downs)))


@triton.jit(do_not_specialize=["pairs", "gate_ups", "downs"])
def _prepare(
    x_ptr, input_scale_ptr, q_ptr, scale_ptr, x_stride, experts_ptr, pair_ptr, gate_up_ptr, down_ptr, pairs, gate_ups,
    downs, HIDDEN: tl.constexpr, WIDTH: tl.constexpr, EXPERTS: tl.constexpr, CHUNK: tl.constexpr, ONCE: tl.constexpr,
    GATE_UP_M: tl.constexpr, DOWN_M: tl.constexpr,
):  # fmt: skip
    """The first EXPERTS programs each collect the pairs of one expert; each of the others quantizes a token."""
    program = tl.program_id(0)
    if program >= EXPERTS:
        _quantize_token(x_ptr, input_scale_ptr, q_ptr, scale_ptr, program - EXPERTS, x_stride, HIDDEN, WIDTH)
    elif EXPERTS > 0:
        start, count = _count(experts_ptr, pairs, program, CHUNK, ONCE)
        _list_tiles(gate_up_ptr, gate_ups, program, start, count, EXPERTS, GATE_UP_M)
        _list_tiles(down_ptr, downs, program, start, count, EXPERTS, DOWN_M)
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
def _list_tiles(list_ptr, tiles, expert, start, count, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Write the expert's tiles into a list [3, tiles], and -1 up to where the next expert's begin.

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
        tl.store(list_ptr + tile, tl.where(row < end, expert, -1), mask=inside)
        tl.store(list_ptr + tiles + tile, row, mask=inside)
        tl.store(list_ptr + 2 * tiles + tile, tl.minimum(row + BLOCK_M, end), mask=inside)
