"""The fused MoE layer against a float reference, shown on a CPU by Triton's interpreter where triton is installed."""

import os
import sys
from importlib.util import find_spec

import pytest
import torch

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("test_moe_gpu.py runs the compiled kernels", allow_module_level=True)
if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("triton was imported already; run this file alone", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

from triton.runtime import interpreter

from lightship.serving.moe.layer import FusedExperts
from lightship.serving.moe.tuning import Down, GateUp, Plan
from tests.serving.moe_reference import (
    Tensors,
    random_routing,
    random_tokens,
    random_weights,
    reference,
    relative_error,
)

PLANS = {
    "direct": Plan(16, direct=True, gate_up=GateUp(split=2), down=Down(block_n=64)),
    "sorted": Plan(16, down=Down(walk=2)),
    "split": Plan(32, gate_up=GateUp(split=2)),
}
TOLERANCE = 0.005
"""Sums in another order move some activations to the next FP8 number; a wrong scale or group is far above it."""


@pytest.fixture(autouse=True, scope="module")
def loops_to_a_number_in_memory() -> None:
    """Triton 3.6's interpreter makes an int of a one-element array, which numpy 2.4 no longer allows."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: type, *scope: object) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patched


def fused(weights: Tensors, **settings: object) -> FusedExperts:
    """A layer made of copies."""
    return FusedExperts(**{name: tensor.clone() for name, tensor in weights.items()}, **settings)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("tokens", [0, 1, 3, 17, 64])
def test_the_layer_is_the_reference(tokens: int, plan: Plan) -> None:
    weights, x_TH = random_weights(6, 512, 256), random_tokens(tokens, 512)
    experts_TK, weights_TK = random_routing(tokens, 6, 3)
    got = fused(weights)(x_TH, experts_TK, weights_TK, plan=plan)
    assert relative_error(got, reference(weights, x_TH, experts_TK, weights_TK, "dynamic")) < TOLERANCE
