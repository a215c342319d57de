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

BLOCK = 128
"""Pairs that a program puts in their places."""
COUNTED = 1024
"""Pairs that are counted at a time."""
COUNT_ALL = 4096
"""Up to so many pairs, each program counts them all itself; beyond, a first launch counts them."""


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
        x_TH, input_scale, q_TH, scale_T, x_TH.stride(0), None, None, None, None, None, None, 0, 0, 0, HIDDEN=hidden,
        SORT="no", EXPERTS=1, BLOCK=BLOCK, COUNTED=COUNTED, BLOCK_M=16, num_warps=8,
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
    """As `quantize`, and the pairs of experts_TK by expert: one launch, or two where there are many pairs."""
    (tokens, hidden), pairs, device = x_TH.shape, experts_TK.numel(), x_TH.device
    tiles = most_tiles(pairs, experts, block_m)
    table = torch.empty(3 * tiles + pairs, dtype=torch.int32, device=device)
    routed = Routed(table[3 * tiles :], *table[: 3 * tiles].view(3, tiles))
    placing = triton.cdiv(pairs, BLOCK)
    counting = triton.cdiv(pairs, COUNTED) if pairs > COUNT_ALL else 0
    counts = torch.empty(counting, triton.next_power_of_2(experts), dtype=torch.int32, device=device)
    sorting = counting or placing
    sort = (
        experts_TK, counts, routed.pair_P, routed.tile_expert, routed.tile_start, routed.tile_end, pairs, tiles,
    )  # fmt: skip
    meta = {"EXPERTS": experts, "BLOCK": BLOCK, "COUNTED": COUNTED, "BLOCK_M": block_m, "num_warps": 8}
    _prepare[(sorting + tokens,)](
        x_TH, input_scale, q_TH, scale_T, x_TH.stride(0), *sort, sorting, HIDDEN=hidden,
        SORT="count" if counting else "place", **meta,
    )  # fmt: skip
    if counting:
        _place[(placing,)](*sort, placing, **meta)
    return routed


@triton.jit(do_not_specialize=["pairs", "tiles", "sorting"])
def _prepare(
    x_ptr, input_scale_ptr, q_ptr, scale_ptr, x_stride, experts_ptr, counts_ptr, pair_ptr, tile_expert_ptr,
    tile_start_ptr, tile_end_ptr, pairs, tiles, sorting, HIDDEN: tl.constexpr, SORT: tl.constexpr,
    EXPERTS: tl.constexpr, BLOCK: tl.constexpr, COUNTED: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The first `sorting` programs count or sort pairs; each of the others quantizes a token."""
    program = tl.program_id(0)
    if program >= sorting:
        _quantize_token(x_ptr, input_scale_ptr, q_ptr, scale_ptr, program - sorting, x_stride, HIDDEN)
    elif SORT == "count":
        _count_block(experts_ptr, counts_ptr, pairs, program, EXPERTS, COUNTED)
    elif SORT == "place":
        _place_block(
            experts_ptr, counts_ptr, pair_ptr, tile_expert_ptr, tile_start_ptr, tile_end_ptr, pairs, tiles, program,
            sorting, False, EXPERTS, BLOCK, COUNTED, BLOCK_M,
        )  # fmt: skip


@triton.jit(do_not_specialize=["pairs", "tiles", "placing"])
def _place(
    experts_ptr, counts_ptr, pair_ptr, tile_expert_ptr, tile_start_ptr, tile_end_ptr, pairs, tiles, placing,
    EXPERTS: tl.constexpr, BLOCK: tl.constexpr, COUNTED: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    _place_block(
        experts_ptr, counts_ptr, pair_ptr, tile_expert_ptr, tile_start_ptr, tile_end_ptr, pairs, tiles,
        tl.program_id(0), placing, True, EXPERTS, BLOCK, COUNTED, BLOCK_M,
    )  # fmt: skip


@triton.jit
def _count_block(experts_ptr, counts_ptr, pairs, block, EXPERTS: tl.constexpr, COUNTED: tl.constexpr):
    BINS: tl.constexpr = triton.next_power_of_2(EXPERTS)
    pair = block * COUNTED + tl.arange(0, COUNTED)
    expert = tl.load(experts_ptr + pair, mask=pair < pairs, other=-1).to(tl.int32)
    here = (expert >= 0) & (expert < EXPERTS)
    tl.store(counts_ptr + block * BINS + tl.arange(0, BINS), tl.histogram(tl.where(here, expert, 0), BINS, mask=here))


@triton.jit
def _quantize_token(x_ptr, input_scale_ptr, q_ptr, scale_ptr, token, x_stride, HIDDEN: tl.constexpr):
    column = tl.arange(0, triton.next_power_of_2(HIDDEN))
    inside = column < HIDDEN
    x = tl.load(x_ptr + token.to(tl.int64) * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if input_scale_ptr is None:
        scale = tl.maximum(tl.max(tl.abs(x), axis=0), LEAST) / FP8_MAX
    else:
        scale = tl.load(input_scale_ptr)
    tl.store(q_ptr + token.to(tl.int64) * HIDDEN + column, to_fp8(x, scale), mask=inside)
    tl.store(scale_ptr + token, scale * UNIT)


@triton.jit
def _place_block(
    experts_ptr, counts_ptr, pair_ptr, tile_expert_ptr, tile_start_ptr, tile_end_ptr, pairs, tiles, block, blocks,
    PRECOUNTED: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr, COUNTED: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Find the places of BLOCK pairs, and write this block's part of the list of tiles."""
    BINS: tl.constexpr = triton.next_power_of_2(EXPERTS)
    bins = tl.arange(0, BINS)
    first = block * BLOCK
    if PRECOUNTED:
        total, before = _counts_from_memory(experts_ptr, counts_ptr, pairs, first, EXPERTS, COUNTED)
    else:
        total, before = _counts_of_all(experts_ptr, pairs, first, EXPERTS, COUNTED)
    start = tl.cumsum(total, axis=0) - total

    pair = first + tl.arange(0, BLOCK)
    expert = tl.load(experts_ptr + pair, mask=pair < pairs, other=-1).to(tl.int32)
    here = (expert >= 0) & (expert < EXPERTS)
    other = tl.arange(0, BLOCK)
    expert_of_other = tl.load(experts_ptr + first + other, mask=first + other < pairs, other=-1).to(tl.int32)
    earlier = (expert_of_other[None, :] == expert[:, None]) & (first + other[None, :] < pair[:, None])
    rank = tl.sum(earlier.to(tl.int32), axis=1)
    place = rank + _look_up(start + before, expert, bins)
    tl.store(pair_ptr + place, pair, mask=here)

    tiles_of = (total + BLOCK_M - 1) // BLOCK_M
    last_tile = tl.cumsum(tiles_of, axis=0)
    for tile_0 in range(block * 64, tiles, blocks * 64):
        tile = tile_0 + tl.arange(0, 64)
        owner = tl.sum((last_tile[None, :] <= tile[:, None]).to(tl.int32), axis=1)
        row = _look_up(start - (last_tile - tiles_of) * BLOCK_M, owner, bins) + tile * BLOCK_M
        end = tl.minimum(row + BLOCK_M, _look_up(start + total, owner, bins))
        inside = tile < tiles
        tl.store(tile_expert_ptr + tile, tl.where(owner < BINS, owner, -1), mask=inside)
        tl.store(tile_start_ptr + tile, row, mask=inside)
        tl.store(tile_end_ptr + tile, end, mask=inside)


@triton.jit
def _look_up(table, index, bins):
    """table[index] of a table in registers; 0 where the index is outside."""
    return tl.sum(tl.where(index[:, None] == bins[None, :], table[None, :], 0), axis=1)


@triton.jit
def _counts_of_all(experts_ptr, pairs, first, EXPERTS: tl.constexpr, COUNTED: tl.constexpr):
    """Pairs of each expert, all of them and those before `first`, counted here."""
    BINS: tl.constexpr = triton.next_power_of_2(EXPERTS)
    total = tl.zeros((BINS,), tl.int32)
    before = tl.zeros((BINS,), tl.int32)
    for start in range(0, pairs, COUNTED):
        pair = start + tl.arange(0, COUNTED)
        expert = tl.load(experts_ptr + pair, mask=pair < pairs, other=-1).to(tl.int32)
        here = (expert >= 0) & (expert < EXPERTS)
        expert = tl.where(here, expert, 0)
        total += tl.histogram(expert, BINS, mask=here)
        if start < first:
            before += tl.histogram(expert, BINS, mask=here & (pair < first))
    return total, before


@triton.jit
def _counts_from_memory(experts_ptr, counts_ptr, pairs, first, EXPERTS: tl.constexpr, COUNTED: tl.constexpr):
    """As `_counts_of_all`, from what `_prepare` counted and the rest of the block in which `first` lies."""
    BINS: tl.constexpr = triton.next_power_of_2(EXPERTS)
    ROWS: tl.constexpr = 16
    total = tl.zeros((BINS,), tl.int32)
    before = tl.zeros((BINS,), tl.int32)
    bins = tl.arange(0, BINS)
    blocks = tl.cdiv(pairs, COUNTED)
    own = first // COUNTED
    for start in range(0, blocks, ROWS):
        block = start + tl.arange(0, ROWS)
        counts = tl.load(counts_ptr + block[:, None] * BINS + bins[None, :], mask=block[:, None] < blocks, other=0)
        total += tl.sum(counts, axis=0)
        before += tl.sum(tl.where(block[:, None] < own, counts, 0), axis=0)
    pair = own * COUNTED + tl.arange(0, COUNTED)
    expert = tl.load(experts_ptr + pair, mask=pair < first, other=-1).to(tl.int32)
    here = (expert >= 0) & (expert < EXPERTS)
    return total, before + tl.histogram(tl.where(here, expert, 0), BINS, mask=here)
