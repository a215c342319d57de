"""The second product: the intermediate by w2, a row a pair; `combine` then adds a token's rows.

`down` has the rows of a tile and writes them, weighted, at their pairs' places. `down_and_combine` is for a few tokens:
a program has all experts of one token and adds them in their order, so nothing is written between.
"""

import torch
import triton
import triton.language as tl

from lightship.serving.moe.decode import expand, split_scales
from lightship.serving.moe.routing import Routed
from lightship.serving.moe.tuning import Down


def down(
    h_PI: torch.Tensor,
    h_scale_PG: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    weights_TK: torch.Tensor,
    routed: Routed,
    how: Down,
    scale: float,
) -> torch.Tensor:
    """bf16 [P, H] by pair, of which this rank's are set: the products, times weight and `scale`."""
    (pairs, inter), hidden = h_PI.shape, w2.shape[2]
    y_PH = torch.empty(pairs, hidden, dtype=torch.bfloat16, device=h_PI.device)
    blocks = triton.cdiv(hidden, how.block_n * how.walk)
    _down[(len(routed.down.expert) * blocks,)](
        h_PI, h_scale_PG, w2, w2_scale, weights_TK, *routed.down, routed.pair_P, y_PH, scale, HIDDEN=hidden,
        INTER=inter, BLOCK_M=how.block_m, BLOCK_N=how.block_n, WALK=how.walk, STAGES=how.stages,
        num_warps=how.warps,
    )  # fmt: skip
    return y_PH


def combine(y_PH: torch.Tensor, experts_TK: torch.Tensor, experts: int, out_TH: torch.Tensor) -> None:
    """out_TH = the sum of each token's rows, those of other ranks' experts left out, in the order of its experts."""
    tokens, hidden = out_TH.shape
    block = min(1024, triton.next_power_of_2(hidden))
    _combine[(tokens, triton.cdiv(hidden, block))](
        y_PH, experts_TK, out_TH, out_TH.stride(0), HIDDEN=hidden, TOP_K=experts_TK.shape[1], EXPERTS=experts,
        BLOCK=block, num_warps=max(1, block // 256),
    )  # fmt: skip


def down_and_combine(
    h_PI: torch.Tensor,
    h_scale_PG: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    experts_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    how: Down,
    scale: float,
    out_TH: torch.Tensor,
) -> None:
    """`down` and `combine` of rows that lie in the order of the pairs."""
    (tokens, hidden), top_k = out_TH.shape, experts_TK.shape[1]
    _down_and_combine[(tokens * triton.cdiv(hidden, how.block_n),)](
        h_PI, h_scale_PG, w2, w2_scale, experts_TK, weights_TK, out_TH, out_TH.stride(0), scale, TOP_K=top_k,
        SLOTS=max(16, triton.next_power_of_2(top_k)), EXPERTS=w2.shape[0], HIDDEN=hidden, INTER=h_PI.shape[1],
        BLOCK_N=how.block_n, STAGES=how.stages, num_warps=how.warps,
    )  # fmt: skip


@triton.jit
def _down(
    h_ptr, h_scale_ptr, w_ptr, w_scale_ptr, weight_ptr, expert_ptr, start_ptr, end_ptr, pair_ptr, y_ptr, scale,
    HIDDEN: tl.constexpr, INTER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WALK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (HIDDEN + BLOCK_N * WALK - 1) // (BLOCK_N * WALK)
    STEPS: tl.constexpr = (INTER + 255) // 256
    WHOLE: tl.constexpr = HIDDEN % (BLOCK_N * WALK) == 0
    tile = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS * WALK
    expert = tl.load(expert_ptr + tile)
    if expert < 0:
        return
    row = tl.load(start_ptr + tile) + tl.arange(0, BLOCK_M)
    inside = row < tl.load(end_ptr + tile)
    pair = tl.load(pair_ptr + row, mask=inside, other=0)
    weight = tl.load(weight_ptr + pair, mask=inside, other=0.0) * scale
    y = y_ptr + pair[:, None].to(tl.int64) * HIDDEN
    w_ptr += expert.to(tl.int64) * (STEPS * HIDDEN * 128)
    w_scale_ptr += expert.to(tl.int64) * (STEPS * HIDDEN)
    h = h_ptr + row[:, None] * INTER
    h_scale = h_scale_ptr + row * (INTER // 128)
    if STEPS == 1:
        h_0, h_1, t_0, t_1 = _rows(h, h_scale, inside, weight, 0, INTER)
        for i in tl.range(0, WALK, num_stages=STAGES):
            n = (block + i) * BLOCK_N + tl.arange(0, BLOCK_N)
            w, s = _weights(w_ptr, w_scale_ptr, n, 0, WHOLE, HIDDEN)
            acc = _step(w, s, h_0, h_1, t_0, t_1)
            _write(y, acc, n, inside, WHOLE, HIDDEN)
    else:
        for i in range(WALK):
            n = (block + i) * BLOCK_N + tl.arange(0, BLOCK_N)
            acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for step in tl.range(STEPS, num_stages=STAGES):
                h_0, h_1, t_0, t_1 = _rows(h, h_scale, inside, weight, step, INTER)
                w, s = _weights(w_ptr, w_scale_ptr, n, step, WHOLE, HIDDEN)
                acc += _step(w, s, h_0, h_1, t_0, t_1)
            _write(y, acc, n, inside, WHOLE, HIDDEN)


@triton.jit
def _rows(h, h_scale, inside, weight, step, INTER: tl.constexpr):
    """Two groups of the tile's rows, and the rows' scales for them, times their weights."""
    k = step * 256 + tl.arange(0, 128)
    h_0 = tl.load(h + k[None, :], mask=inside[:, None], other=0.0)
    t_0 = tl.load(h_scale + 2 * step, mask=inside, other=0.0) * weight
    second = inside
    if INTER % 256 != 0:
        second = inside & (step * 256 + 128 < INTER)
    h_1 = tl.load(h + k[None, :] + 128, mask=second[:, None], other=0.0)
    t_1 = tl.load(h_scale + 2 * step + 1, mask=second, other=0.0) * weight
    return h_0, h_1, t_0, t_1


@triton.jit
def _weights(w_ptr, w_scale_ptr, n, step, WHOLE: tl.constexpr, HIDDEN: tl.constexpr):
    """A tile of packed weights and its pairs of scales; WHOLE: none of the outputs is beyond HIDDEN."""
    k = tl.arange(0, 128)
    w = w_ptr + step * (HIDDEN * 128) + (n[:, None] * 128 + k[None, :])
    s = w_scale_ptr + step * HIDDEN + n
    if WHOLE:
        return tl.load(w), tl.load(s)
    return tl.load(w, mask=n[:, None] < HIDDEN, other=0), tl.load(s, mask=n < HIDDEN, other=0)


@triton.jit
def _step(w, s, h_0, h_1, t_0, t_1):
    """Two groups' part of the product, scaled: [outputs, rows]."""
    low, high = expand(w)
    s_0, s_1 = split_scales(s)
    acc = tl.dot(low, h_0.T) * (s_0[:, None] * t_0[None, :])
    acc += tl.dot(high, h_1.T) * (s_1[:, None] * t_1[None, :])
    return acc


@triton.jit
def _write(y, acc, n, inside, WHOLE: tl.constexpr, HIDDEN: tl.constexpr):
    mask = inside[:, None]
    if not WHOLE:
        mask &= n[None, :] < HIDDEN
    tl.store(y + n[None, :], tl.trans(acc.to(tl.bfloat16)), mask=mask)


@triton.jit
def _combine(
    y_ptr, expert_ptr, out_ptr, out_stride, HIDDEN: tl.constexpr, TOP_K: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(TOP_K):
        pair = token * TOP_K + slot
        expert = tl.load(expert_ptr + pair).to(tl.int32)
        here = (expert >= 0) & (expert < EXPERTS)
        acc += tl.load(y_ptr + pair * HIDDEN + n, mask=here & (n < HIDDEN), other=0.0).to(tl.float32)
    tl.store(out_ptr + token * out_stride + n, acc.to(tl.bfloat16), mask=n < HIDDEN)


@triton.jit
def _down_and_combine(
    h_ptr, h_scale_ptr, w_ptr, w_scale_ptr, expert_ptr, weight_ptr, out_ptr, out_stride, scale, TOP_K: tl.constexpr,
    SLOTS: tl.constexpr, EXPERTS: tl.constexpr, HIDDEN: tl.constexpr, INTER: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The right operand is all of the token's rows; of each expert's product only its own row's column counts."""
    BLOCKS: tl.constexpr = (HIDDEN + BLOCK_N - 1) // BLOCK_N
    STEPS: tl.constexpr = (INTER + 255) // 256
    token = tl.program_id(0) // BLOCKS
    n = tl.program_id(0) % BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    slot = tl.arange(0, SLOTS)
    pair = token * TOP_K + slot
    expert = tl.load(expert_ptr + pair, mask=slot < TOP_K, other=-1).to(tl.int32)
    here = (expert >= 0) & (expert < EXPERTS)
    weight = tl.load(weight_ptr + pair, mask=here, other=0.0) * scale
    order = tl.cumsum(here.to(tl.int32), axis=0) - 1
    h = h_ptr + pair[:, None] * INTER
    h_scale = h_scale_ptr + pair * (INTER // 128)
    WHOLE: tl.constexpr = HIDDEN % BLOCK_N == 0
    acc = tl.zeros((BLOCK_N, SLOTS), tl.float32)
    for i in tl.range(tl.sum(here.to(tl.int32), axis=0) * STEPS, num_stages=STAGES):
        step = i % STEPS
        now = here & (order == i // STEPS)
        owner = tl.sum(tl.where(now, expert, 0), axis=0).to(tl.int64)
        h_0, h_1, t_0, t_1 = _rows(h, h_scale, here, tl.where(now, weight, 0.0), step, INTER)
        w, s = _weights(
            w_ptr + owner * (STEPS * HIDDEN * 128),
            w_scale_ptr + owner * (STEPS * HIDDEN),
            n,
            step,
            WHOLE,
            HIDDEN,
        )
        acc += _step(w, s, h_0, h_1, t_0, t_1)
    mask = n < HIDDEN
    tl.store(out_ptr + token.to(tl.int64) * out_stride + n, tl.sum(acc, axis=1).to(tl.bfloat16), mask=mask)
