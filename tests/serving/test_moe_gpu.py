"""The compiled MoE layer at a real rank's sizes, against float32."""

import pytest
import torch

from tests.serving.moe_reference import (
    Tensors,
    fused,
    random_routing,
    random_tokens,
    random_weights,
    reference,
    relative_error,
)

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from lightship.serving.moe.layer import FusedExperts
from lightship.serving.moe.timing import random_inputs
from lightship.serving.moe.tuning import SHAPES, Down, GateUp, Plan

pytestmark = pytest.mark.gpu
EXPERTS, HIDDEN, INTER, TOP_K = 64, 7168, 256, 8
TOLERANCE = 0.006
"""Against the same FP8 activations: bf16 sums, and activations that fall to the next FP8 number."""

PLANS = {
    "direct": Plan(GateUp(split=8), Down(block_n=64), direct=True),
    "16 rows, split": Plan(GateUp(16, split=3, warps=4), Down(16, walk=14)),
    "32 rows": Plan(GateUp(32), Down(32, walk=7, warps=8)),
    "32 rows, short tiles": Plan(GateUp(32, short=16, ordered=True), Down(32, walk=4)),
    "64 rows, then 32": Plan(GateUp(64, ordered=True), Down(32, walk=14)),
    "64 rows, short tiles": Plan(GateUp(64, short=16, ordered=True), Down(64, walk=4)),
    "outputs beyond the last": Plan(GateUp(16), Down(16, walk=5)),
}
STATIC = ("direct", "64 rows, short tiles")


@pytest.fixture(scope="module")
def weights() -> Tensors:
    return random_weights(EXPERTS, HIDDEN, INTER, "cuda")


@pytest.fixture(scope="module")
def layer(weights: Tensors) -> FusedExperts:
    return fused(weights, top_k=TOP_K)


def given(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return random_tokens(tokens, HIDDEN, "cuda", seed), *random_routing(tokens, EXPERTS, TOP_K, "cuda", seed)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("tokens", [1, 5, 130])
def test_every_plan_is_the_reference(weights: Tensors, layer: FusedExperts, plan: Plan, tokens: int) -> None:
    x_TH, experts_TK, weights_TK = given(tokens)
    out = torch.full_like(x_TH, float("nan"))
    got = layer(x_TH, experts_TK, weights_TK, out=out, plan=plan)
    assert got is out
    assert relative_error(got, reference(weights, x_TH, experts_TK, weights_TK, "dynamic")) < TOLERANCE


@pytest.mark.parametrize("plan", [PLANS["direct"], PLANS["64 rows, then 32"]], ids=["direct", "64 rows, then 32"])
def test_a_scale_is_in_the_weights(weights: Tensors, layer: FusedExperts, plan: Plan) -> None:
    x_TH, experts_TK, weights_TK = given(5)
    got = fused(weights, top_k=TOP_K, scale=2.5)(x_TH, experts_TK, weights_TK, plan=plan)
    assert torch.equal(got, layer(x_TH, experts_TK, weights_TK * 2.5, plan=plan))


@pytest.mark.parametrize("tokens", [0, 1, 2, 16, 64, 256, 1024, 4096, 9001])
def test_the_layer_is_the_reference_at_every_size_and_gives_the_same_bits_twice(
    weights: Tensors, layer: FusedExperts, tokens: int
) -> None:
    x_TH, experts_TK, weights_TK = given(tokens, seed=1)
    got = layer(x_TH, experts_TK, weights_TK)
    assert torch.equal(got, layer(x_TH, experts_TK.long(), weights_TK))
    assert relative_error(got, reference(weights, x_TH, experts_TK, weights_TK, "dynamic")) < TOLERANCE


@pytest.mark.parametrize("tokens", [2, 300, 1500])
@pytest.mark.parametrize("routing", ["one expert", "no expert", "half of other ranks", "two experts of all"])
def test_any_routing(weights: Tensors, layer: FusedExperts, tokens: int, routing: str) -> None:
    x_TH, experts_TK, weights_TK = given(tokens, seed=2)
    match routing:
        case "one expert":
            experts_TK = torch.full_like(experts_TK, EXPERTS - 1)
        case "no expert":
            experts_TK = torch.full_like(experts_TK, -1)
        case "half of other ranks":
            experts_TK = torch.where(experts_TK % 2 == 0, -1, experts_TK)
            experts_TK[0, 0] = EXPERTS + 7
        case _:
            experts_TK = experts_TK % 2 * 5
    got = layer(x_TH, experts_TK, weights_TK)
    want = reference(weights, x_TH, experts_TK, weights_TK, "dynamic")
    assert relative_error(got, want) < TOLERANCE if want.any() else not got.any()


def test_static_scales_saturate_and_are_the_reference(weights: Tensors) -> None:
    x_TH, experts_TK, weights_TK = given(100, seed=3)
    scales = (torch.tensor(0.02, device="cuda"), torch.tensor(0.05, device="cuda"))
    layer = fused(weights, w13_input_scale=scales[0], w2_input_scale=scales[1], activations="static")
    for name in STATIC:
        got = layer(x_TH, experts_TK, weights_TK, plan=PLANS[name])
        assert relative_error(got, reference(weights, x_TH, experts_TK, weights_TK, "static", scales)) < TOLERANCE


def test_a_captured_graph_follows_its_inputs(layer: FusedExperts) -> None:
    for tokens in (1, 48, 700):
        buffers, out = given(tokens, seed=4), torch.empty(tokens, HIDDEN, dtype=torch.bfloat16, device="cuda")
        layer(*buffers, out=out)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            layer(*buffers, out=out)
        for seed in (5, 6):
            for buffer, new in zip(buffers, given(tokens, seed), strict=True):
                buffer.copy_(new)
            graph.replay()
            assert torch.equal(out, layer(*buffers))


def test_shards_of_tensor_parallelism_and_of_experts_add_up_to_the_whole() -> None:
    weights = random_weights(16, 2048, 512, "cuda")
    x_TH, (experts_TK, weights_TK) = random_tokens(70, 2048, "cuda"), random_routing(70, 16, 4, "cuda")
    whole = fused(weights)(x_TH, experts_TK, weights_TK).float()
    halves = []
    for part in (slice(0, 256), slice(256, 512)):
        gate_up = [weights[n].unflatten(1, (2, 512))[:, :, part].flatten(1, 2) for n in ("w13", "w13_scale")]
        shard = {"w13": gate_up[0], "w13_scale": gate_up[1]}
        shard["w2"] = weights["w2"][..., part.start // 2 : part.stop // 2].contiguous()
        shard["w2_scale"] = weights["w2_scale"][..., part.start // 128 : part.stop // 128].contiguous()
        halves.append(fused(shard)(x_TH, experts_TK, weights_TK).float())
    assert relative_error(halves[0] + halves[1], whole) < TOLERANCE
    ranks = []
    for first in (0, 8):
        own = {name: tensor[first : first + 8] for name, tensor in weights.items()}
        local = torch.where((experts_TK >= first) & (experts_TK < first + 8), experts_TK - first, -1)
        ranks.append(fused(own, total_experts=16)(x_TH, local, weights_TK).float())
    assert relative_error(ranks[0] + ranks[1], whole) < TOLERANCE


def test_a_shard_of_an_odd_number_of_groups() -> None:
    weights = random_weights(8, 640, 384, "cuda")
    x_TH, (experts_TK, weights_TK) = random_tokens(33, 640, "cuda"), random_routing(33, 8, 3, "cuda")
    want = reference(weights, x_TH, experts_TK, weights_TK, "dynamic")
    layer = fused(weights, top_k=3)
    for plan in (Plan(GateUp(split=2), Down(block_n=64), direct=True), Plan(GateUp(32), Down(16))):
        assert relative_error(layer(x_TH, experts_TK, weights_TK, plan=plan), want) < TOLERANCE


def test_the_expert_parallel_rank_of_deepseek_v3() -> None:
    shape = SHAPES["ep8"]
    weights = random_weights(shape.experts, shape.hidden, shape.intermediate, "cuda")
    layer = fused(weights, top_k=shape.top_k, total_experts=shape.total)
    for tokens in (64, 1024):
        (inputs,) = random_inputs(shape, tokens, 1)
        want = reference(weights, *inputs, "dynamic")
        got = layer(*inputs)
        assert relative_error(got, want) < TOLERANCE if want.any() else not got.any()
