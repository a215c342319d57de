"""The first product: x by w13, SiLU of gate times up, and the result to FP8 by row and group of 128.

The weights are the left operand, taken from shared memory to registers, decoded there and multiplied from there; rows
of x are the right one. A program has 128 gate and the same 128 up outputs of one tile's rows, hence whole groups of the
intermediate, whose scales then do not depend on how the layer is sharded. A tile takes the time of its full height
however few rows it has, so an expert's last one, if it is short, may be worked on as a lower one.

Where tiles are too few to fill the GPU, the inputs are split over several programs. They leave sums in float32, and
`activate` adds them in their order.
"""

import torch
import triton
import triton.language as tl

from lightship.serving.moe.decode import FP8_MAX, LEAST, UNIT, add_scaled, expand, split_scales, to_fp8
from lightship.serving.moe.routing import Routed
from lightship.serving.moe.tuning import GateUp
from lightship.w4afp8 import GROUP


def gate_up(
    q_TH: torch.Tensor,
    scale_T: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    experts_TK: torch.Tensor,
    routed: Routed | None,
    how: GateUp,
    input_scale: torch.Tensor | None,
    h_PI: torch.Tensor,
    h_scale_PG: torch.Tensor,
) -> None:
    """Fill h_PI e4m3 and h_scale_PG float32, in the order of `routed`, or of the pairs where that is None.

    `input_scale` is that of the intermediate where it is static.
    """
    hidden, (pairs, intermediate) = q_TH.shape[1], h_PI.shape
    experts, pairs_of_groups, outputs, _ = w13.shape
    assert outputs == 2 * intermediate
    split = min(how.split, pairs_of_groups)
    sums = None
    if split > 1:
        sums = torch.empty(split, pairs, outputs, dtype=torch.float32, device=q_TH.device)
    lists = (experts_TK, None, None, None) if routed is None else (*routed.gate_up, routed.pair_P)
    tiles = pairs if routed is None else len(routed.gate_up.expert)
    _gate_up[(tiles * split * (intermediate // GROUP),)](
        q_TH, scale_T, w13, w13_scale, *lists, input_scale, h_PI, h_scale_PG, sums, pairs, ORDERED=how.ordered,
        TOP_K=experts_TK.shape[1], EXPERTS=experts, HIDDEN=hidden, INTER=intermediate, SPLIT=split, BLOCK_M=how.block_m,
        SHORT=how.short, STAGES=how.stages, num_warps=how.warps,
    )  # fmt: skip
    if sums is not None:
        _activate[(pairs, intermediate // GROUP)](
            sums, experts_TK if routed is None else None, input_scale, h_PI, h_scale_PG, pairs, EXPERTS=experts,
            INTER=intermediate, SPLIT=split, num_warps=1,
        )  # fmt: skip


@triton.jit(do_not_specialize=["pairs"])
def _gate_up(
    q_ptr, scale_ptr, w_ptr, w_scale_ptr, expert_ptr, start_ptr, end_ptr, pair_ptr, input_scale_ptr, h_ptr,
    h_scale_ptr, sums_ptr, pairs, ORDERED: tl.constexpr, TOP_K: tl.constexpr, EXPERTS: tl.constexpr,
    HIDDEN: tl.constexpr, INTER: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, SHORT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    COLUMNS: tl.constexpr = INTER // 128
    tile = tl.program_id(0) // (COLUMNS * SPLIT)
    part = tl.program_id(0) // COLUMNS % SPLIT
    column = tl.program_id(0) % COLUMNS
    expert = tl.load(expert_ptr + tile).to(tl.int32)
    if (expert < 0) | (expert >= EXPERTS):
        return
    if start_ptr is None:
        start = tile
        end = tile + 1
    else:
        start = tl.load(start_ptr + tile)
        end = tl.load(end_ptr + tile)
    if SHORT > 0 and end - start <= SHORT:
        _tile(
            q_ptr, scale_ptr, w_ptr, w_scale_ptr, pair_ptr, input_scale_ptr, h_ptr, h_scale_ptr, sums_ptr, pairs,
            expert, start, end, part, column, ORDERED, TOP_K, HIDDEN, INTER, SPLIT, SHORT, STAGES,
        )  # fmt: skip
    else:
        _tile(
            q_ptr, scale_ptr, w_ptr, w_scale_ptr, pair_ptr, input_scale_ptr, h_ptr, h_scale_ptr, sums_ptr, pairs,
            expert, start, end, part, column, ORDERED, TOP_K, HIDDEN, INTER, SPLIT, BLOCK_M, STAGES,
        )  # fmt: skip


@triton.jit
def _tile(
    q_ptr, scale_ptr, w_ptr, w_scale_ptr, pair_ptr, input_scale_ptr, h_ptr, h_scale_ptr, sums_ptr, pairs, expert,
    start, end, part, column, ORDERED: tl.constexpr, TOP_K: tl.constexpr, HIDDEN: tl.constexpr, INTER: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    STEPS: tl.constexpr = (HIDDEN + 255) // 256
    PART: tl.constexpr = (STEPS + SPLIT - 1) // SPLIT
    OUTPUTS: tl.constexpr = 2 * INTER
    row = start + tl.arange(0, BLOCK_M)
    inside = row < end
    if pair_ptr is None:
        token = tl.where(inside, row // TOP_K, 0)
    else:
        token = tl.load(pair_ptr + row, mask=inside, other=0) // TOP_K
    step_0 = part * PART
    steps = tl.minimum(STEPS - step_0, PART)

    k = tl.arange(0, 128)
    n = column * 128 + tl.arange(0, 128)
    first = expert.to(tl.int64) * STEPS + step_0
    x = q_ptr + token[:, None].to(tl.int64) * HIDDEN + (step_0 * 256 + k)[None, :]
    w = w_ptr + first * (OUTPUTS * 128) + (n[:, None] * 128 + k[None, :])
    s = w_scale_ptr + first * OUTPUTS + n
    gate = tl.zeros((128, BLOCK_M), tl.float32)
    up = tl.zeros((128, BLOCK_M), tl.float32)
    # Scales are loaded an iteration ahead: Triton keeps only what a product reads in flight.
    gate_scale = tl.load(s)
    up_scale = tl.load(s + INTER)
    for step in tl.range(steps, num_stages=STAGES):
        x_0 = tl.load(x, mask=inside[:, None], other=0.0)
        if HIDDEN % 256 == 0:
            x_1 = tl.load(x + 128, mask=inside[:, None], other=0.0)
        else:
            x_1 = tl.load(x + 128, mask=inside[:, None] & (step_0 + step + 1 < STEPS), other=0.0)
        w_gate = tl.load(w)
        w_up = tl.load(w + INTER * 128)
        s += OUTPUTS
        gate_scale_next = tl.load(s, mask=step + 1 < steps, other=0)
        up_scale_next = tl.load(s + INTER, mask=step + 1 < steps, other=0)
        low, high = expand(w_gate)
        s_0, s_1 = split_scales(gate_scale)
        gate = add_scaled(gate, tl.dot(low, x_0.T), s_0[:, None], ORDERED)
        gate = add_scaled(gate, tl.dot(high, x_1.T), s_1[:, None], ORDERED)
        low, high = expand(w_up)
        s_0, s_1 = split_scales(up_scale)
        up = add_scaled(up, tl.dot(low, x_0.T), s_0[:, None], ORDERED)
        up = add_scaled(up, tl.dot(high, x_1.T), s_1[:, None], ORDERED)
        gate_scale = gate_scale_next
        up_scale = up_scale_next
        x += 256
        w += OUTPUTS * 128

    x_scale = tl.load(scale_ptr + token, mask=inside, other=0.0)
    gate *= x_scale[None, :]
    up *= x_scale[None, :]
    if SPLIT == 1:
        _store(gate, up, input_scale_ptr, h_ptr, h_scale_ptr, row, inside, n, column, INTER)
    else:
        sums = sums_ptr + (part * pairs + row)[:, None].to(tl.int64) * OUTPUTS + n[None, :]
        tl.store(sums, tl.trans(gate), mask=inside[:, None])
        tl.store(sums + INTER, tl.trans(up), mask=inside[:, None])


@triton.jit
def _store(gate, up, input_scale_ptr, h_ptr, h_scale_ptr, row, inside, n, column, INTER: tl.constexpr):
    """silu(gate) * up of [128, rows] to FP8, and its scales."""
    h = gate / (1 + tl.exp(-gate)) * up
    if input_scale_ptr is None:
        scale = tl.maximum(tl.max(tl.abs(h), axis=0), LEAST) / FP8_MAX
    else:
        scale = tl.zeros((h.shape[1],), tl.float32) + tl.load(input_scale_ptr)
    tl.store(h_ptr + row[:, None] * INTER + n[None, :], tl.trans(to_fp8(h, 1 / scale[None, :])), mask=inside[:, None])
    tl.store(h_scale_ptr + row * (INTER // 128) + column, scale * UNIT, mask=inside)


@triton.jit(do_not_specialize=["pairs"])
def _activate(
    sums_ptr, expert_ptr, input_scale_ptr, h_ptr, h_scale_ptr, pairs, EXPERTS: tl.constexpr, INTER: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Add the parts of one row's group of 128 in their order, then as the end of `_gate_up`."""
    row = tl.program_id(0)
    column = tl.program_id(1)
    if expert_ptr is not None:
        expert = tl.load(expert_ptr + row).to(tl.int32)
        if (expert < 0) | (expert >= EXPERTS):
            return
    n = column * 128 + tl.arange(0, 128)
    gate = tl.zeros((128,), tl.float32)
    up = tl.zeros((128,), tl.float32)
    for part in tl.static_range(SPLIT):
        sums = sums_ptr + (part * pairs + row).to(tl.int64) * (2 * INTER) + n
        gate += tl.load(sums)
        up += tl.load(sums + INTER)
    h = gate / (1 + tl.exp(-gate)) * up
    if input_scale_ptr is None:
        scale = tl.maximum(tl.max(tl.abs(h), axis=0), LEAST) / FP8_MAX
    else:
        scale = tl.load(input_scale_ptr)
    tl.store(h_ptr + row * INTER + n, to_fp8(h, 1 / scale))
    tl.store(h_scale_ptr + row * (INTER // 128) + column, scale * UNIT)
