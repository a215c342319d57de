"""The fused MoE layer against a float reference, shown on a CPU by Triton's interpreter where triton is installed."""

import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest
import torch

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("test_moe_gpu.py runs the compiled kernels", allow_module_level=True)
if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("triton was imported already; run this file alone", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

from triton import language
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

from lightship.serving.moe import routing
from lightship.serving.moe.tuning import Down, GateUp, Plan
from tests.serving.moe_reference import (
    Tensors,
    fused,
    random_routing,
    random_tokens,
    random_weights,
    reference,
    relative_error,
)

PLANS = {
    "direct": Plan(GateUp(split=2), Down(block_n=64), direct=True),
    "sorted": Plan(down=Down(walk=2)),
    "split": Plan(GateUp(32, split=2), Down(32)),
    "of two heights": Plan(GateUp(32), Down(16)),
    "with short tiles": Plan(GateUp(32, short=16), Down(32)),
}
EXPERTS, HIDDEN, INTER, TOP_K = 4, 384, 256, 3
TOLERANCE = 0.004
"""Relative norm. The rows of the second product and their sum are rounded to bf16: 2^-9 / sqrt(3) of each number at
most, hence 0.0016 for both. Float sums in another order move one activation in some hundreds to the next FP8 number,
6 % away: another 0.002. A wrong scale or group, a lost pair or a truncated bf16 (0.006) is above it."""


def round_to_bf16(src: TensorHandle, dst_type: object, cast: Callable[..., TensorHandle]) -> TensorHandle:
    """The interpreter's conversion, but float32 goes to the nearest bf16, as on a GPU; Triton 3.6 truncates it."""
    if src.dtype.scalar == language.float32 and dst_type.scalar == language.bfloat16:
        bits = torch.from_numpy(np.array(src.data, dtype=np.float32, ndmin=1)).bfloat16().view(torch.uint16).numpy()
        return TensorHandle(bits.reshape(np.shape(src.data)), dst_type.scalar)
    return cast(src, dst_type)


@pytest.fixture(autouse=True, scope="module")
def interpreter_like_a_gpu() -> Iterator[None]:
    """Nearest bf16, and loops to a number in memory: numpy 2.4 makes no int of the interpreter's one-element arrays."""
    patch, builder = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder

    def patched(tensor: type, *scope: object) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
        cast = builder.cast_impl
        for name in ("cast_impl", "create_fp_trunc"):
            monkeypatch.setattr(builder, name, lambda self, src, to: round_to_bf16(src, to, partial(cast, self)))
        yield


@pytest.fixture(scope="module")
def weights() -> Tensors:
    return random_weights(EXPERTS, HIDDEN, INTER)


def given(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return random_tokens(tokens, HIDDEN), *random_routing(tokens, EXPERTS, TOP_K)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_every_plan_is_the_reference(weights: Tensors, plan: Plan) -> None:
    tokens = 2 if plan.direct else 20
    x_TH, experts_TK, weights_TK = given(tokens)
    # Expert 0 fills tiles of either height, the others have short ones.
    experts_TK = torch.tensor([[0, 1 + t % 3, t % 2 - 1] for t in range(tokens)])
    got = fused(weights)(x_TH, experts_TK, weights_TK, plan=plan)
    assert relative_error(got, reference(weights, x_TH, experts_TK, weights_TK, "dynamic")) < TOLERANCE


@pytest.mark.parametrize("plan", [PLANS["direct"], PLANS["of two heights"]], ids=["direct", "of two heights"])
def test_a_scale_is_in_the_weights(weights: Tensors, plan: Plan) -> None:
    x_TH, experts_TK, weights_TK = given(2)
    got = fused(weights, scale=2.5)(x_TH, experts_TK, weights_TK, plan=plan)
    assert got.equal(fused(weights)(x_TH, experts_TK, weights_TK * 2.5, plan=plan))


def test_no_tokens_are_no_work(weights: Tensors) -> None:
    assert fused(weights)(*given(0)).shape == (0, HIDDEN)


def test_static_scales_saturate_and_are_the_reference(weights: Tensors) -> None:
    scales = (torch.tensor(0.01), torch.tensor(0.01))
    layer = fused(weights, w13_input_scale=scales[0], w2_input_scale=scales[1], activations="static")
    x_TH, experts_TK, weights_TK = given(2)
    x_TH *= 5 * 448 * scales[0] / x_TH.abs().max()
    want = reference(weights, x_TH, experts_TK, weights_TK, "static", scales)
    assert relative_error(layer(x_TH, experts_TK, weights_TK, plan=PLANS["sorted"]), want) < TOLERANCE


@pytest.mark.parametrize("direct", [True, False])
def test_a_token_whose_experts_are_all_elsewhere_is_zero(weights: Tensors, direct: bool) -> None:
    x_TH, experts_TK, weights_TK = given(2)
    experts_TK[0] = torch.tensor([-1, EXPERTS, EXPERTS + 70])
    experts_TK[1, 1] = -1
    out_TH = torch.full_like(x_TH, float("nan"))
    plan = PLANS["direct" if direct else "with short tiles"]
    fused(weights)(x_TH, experts_TK, weights_TK, out=out_TH, plan=plan)
    assert not out_TH[0].any()
    assert relative_error(out_TH, reference(weights, x_TH, experts_TK, weights_TK, "dynamic")) < TOLERANCE


def test_ranks_of_expert_parallelism_add_up_to_the_whole(weights: Tensors) -> None:
    x_TH, experts_TK, weights_TK = given(3)
    total_TH = torch.zeros(3, HIDDEN)
    for first in (0, 2):
        own = {name: tensor[first : first + 2] for name, tensor in weights.items()}
        local_TK = torch.where((experts_TK >= first) & (experts_TK < first + 2), experts_TK - first, -1)
        layer = fused(own, total_experts=EXPERTS, top_k=TOP_K)
        total_TH += layer(x_TH, local_TK, weights_TK, plan=PLANS["sorted"]).float()
    assert relative_error(total_TH, reference(weights, x_TH, experts_TK, weights_TK, "dynamic")) < TOLERANCE


ROUTINGS = {
    "even": lambda tokens: random_routing(tokens, 5, 2)[0],
    "one expert": lambda tokens: torch.full((tokens, 2), 3, dtype=torch.int32),
    "the last expert": lambda tokens: torch.full((tokens, 2), 4, dtype=torch.int32),
    "no expert": lambda tokens: torch.full((tokens, 2), -1, dtype=torch.int32),
    "two experts of all": lambda tokens: torch.arange(2 * tokens, dtype=torch.int64).view(tokens, 2) % 2 * 3,
    "others of other ranks": lambda tokens: torch.arange(2 * tokens, dtype=torch.int64).view(tokens, 2) % 9 - 2,
}


@pytest.mark.parametrize("routing_of", ROUTINGS.values(), ids=ROUTINGS)
@pytest.mark.parametrize(("tokens", "chunks"), [(3, (8,)), (21, (8, 16))])
def test_pairs_are_sorted_stably_and_tiles_cover_them(
    routing_of: Callable[[int], torch.Tensor],
    tokens: int,
    chunks: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(routing, "CHUNKS", chunks)
    experts_TK = routing_of(tokens)
    x_TH, scale_T = torch.ones(tokens, 128, dtype=torch.bfloat16), torch.empty(tokens)
    q_TH = x_TH.to(torch.float8_e4m3fn)
    plan = Plan(GateUp(32), Down(16))
    routed = routing.quantize_and_sort(x_TH, None, scale_T, q_TH, experts_TK, 5, plan)
    expert_P = experts_TK.flatten()
    want = [pair for expert in range(5) for pair in (expert_P == expert).nonzero().flatten().tolist()]
    assert routed.pair_P[: len(want)].tolist() == want
    for tiles, height in ((routed.gate_up, 32), (routed.down, 16)):
        covered = []
        for expert, start, end in zip(*tiles, strict=True):
            if expert >= 0:
                assert 0 < end - start <= height
                assert set(expert_P[routed.pair_P[start:end].long()].tolist()) == {int(expert)}
                covered += range(start, end)
        assert covered == list(range(len(want)))
