"""The fused W4AFP8 MoE layer on one GPU, beside SGLang's, at DeepSeek-V3's shapes.

    python -m benchmarks.moe_kernel [--sglang CHECKPOINT] [--shapes tp8,ep8] [--tokens 1,16] [--seconds 540]

Times are medians over CUDA graphs, of the whole layer from hidden states and routing to combined output, in
microseconds; the floor is the bytes of the touched experts at 3 TB/s. Errors are relative norms against float32 with
the same int4 weights. `--sglang` names a W4AFP8 checkpoint directory, which SGLang 0.5.17 wants before a layer can be
used alone. What is measured is written after every step.
"""

import argparse
import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lightship.serving.moe.layer import FusedExperts
from lightship.serving.moe.timing import Tokens, batches_for, median_us, random_inputs, random_layer
from lightship.serving.moe.tune import Steps
from lightship.serving.moe.tuning import SHAPES, Plan, Shape, plan_for
from lightship.w4afp8 import GROUP, dequantize_int4

TOKENS = (1, 16, 64, 256, 1024, 4096)
BYTES_A_US = 3e6


class Results:
    """A list of measured rows, on disk after each."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.end, self.rows = path, time.monotonic() + seconds, list[dict[str, Any]]()

    def measure(self, name: dict[str, Any], what: Callable[[], dict[str, Any]]) -> None:
        """Add what() under this name, or why it failed; nothing once the time is used up."""
        if time.monotonic() > self.end:
            return
        start = time.monotonic()
        try:
            row = name | what()
        except Exception as error:
            traceback.print_exc()
            row = name | {"error": repr(error)[:300]}
        self.rows.append(row)
        print(f"[{time.monotonic() - start:5.1f} s]", json.dumps(row, default=str), flush=True)
        head = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
        self.path.write_text(json.dumps(head | {"rows": self.rows}, indent=1, default=str) + "\n")


def floor_us(shape: Shape, inputs: list[Tokens]) -> float:
    """Microseconds in which the touched experts' weights and scales can be read."""
    experts = sum(len(e[e >= 0].unique()) for _, e, _ in inputs) / len(inputs)
    weights = 3 * shape.intermediate * shape.hidden
    return experts * (weights / 2 + weights / GROUP * 2) / BYTES_A_US


def step_times(layer: FusedExperts, inputs: list[Tokens], plan: Plan) -> dict[str, float]:
    """Each of the layer's steps alone, in microseconds."""
    steps = Steps(layer, inputs, plan.block_m, plan.direct)
    found = {
        "routing": median_us(steps.route, steps.made),
        "gate_up": median_us(lambda made: steps.gate_up(made, plan.gate_up), steps.made),
        "down": median_us(lambda made: steps.down(made, plan.down), steps.made),
    }
    if not plan.direct:
        found["combine"] = median_us(steps.combine, steps.made)
    return {name: round(us, 2) for name, us in found.items()}


def reference(weights: dict[str, torch.Tensor], given: Tokens) -> torch.Tensor:
    """The layer in float32, nothing rounded."""
    x_TH, experts_TK, weights_TK = given
    out_TH = torch.zeros_like(x_TH, dtype=torch.float32)
    for expert in experts_TK[experts_TK >= 0].unique().tolist():
        token, slot = (experts_TK == expert).nonzero(as_tuple=True)
        w13, w2 = (dequantize_int4(weights[w][expert], weights[f"{w}_scale"][expert]) for w in ("w13", "w2"))
        gate, up = (x_TH[token].float() @ w13.T).chunk(2, dim=-1)
        h = torch.nn.functional.silu(gate) * up
        out_TH.index_add_(0, token, (h @ w2.T) * weights_TK[token, slot, None])
    return out_TH


def static_scales(weights: dict[str, torch.Tensor], given: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """Input scales as calibration finds them: the largest activations / 448, the second with room to twice its size."""
    x_TH, experts_TK, _ = given
    expert = int(experts_TK[experts_TK >= 0][0])
    token, _ = (experts_TK == expert).nonzero(as_tuple=True)
    gate, up = (x_TH[token].float() @ dequantize_int4(weights["w13"][expert], weights["w13_scale"][expert]).T).chunk(
        2, -1
    )
    largest = (torch.nn.functional.silu(gate) * up).abs().max()
    return x_TH.abs().max().float() / 448, 2 * largest / 448


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return round(float((got.float() - want).norm() / want.norm()), 5)


def clones(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in weights.items()}


def whole_layer(layer: FusedExperts, plan: Plan | None = None) -> Callable[[Tokens], torch.Tensor]:
    """The call that is timed."""
    return lambda given: layer(*given, plan=plan)


def errors(name: str, shape: Shape, results: Results, sglang: Any) -> None:
    """Relative errors at a few sizes."""
    weights = random_layer(shape)
    for tokens in (64, 257):
        (given,) = random_inputs(shape, tokens, 1, seed=7)
        want, scales = reference(weights, given), static_scales(weights, given)

        def ours(
            static: bool, given: Tokens = given, want: torch.Tensor = want, scales: tuple[torch.Tensor, ...] = scales
        ) -> dict[str, Any]:
            layer = FusedExperts(
                **clones(weights),
                w13_input_scale=scales[0],
                w2_input_scale=scales[1],
                activations="static" if static else "dynamic",
                total_experts=shape.total,
            )
            got = layer(*given)
            again = layer(*given)
            return {"relative_error": relative_error(got, want), "same_twice": bool(torch.equal(got, again))}

        for static in (False, True):
            key = {"shape": name, "M": tokens, "engine": f"lightship {'static' if static else 'dynamic'}"}
            results.measure(key, lambda static=static: ours(static))
        if sglang:
            sglang.errors(name, shape, results, weights, given, want, scales)


def times(name: str, shape: Shape, results: Results, token_counts: list[int], sglang: Any) -> None:
    """The whole layer and its steps at each number of tokens."""
    weights = random_layer(shape)
    layer = FusedExperts(**clones(weights), top_k=shape.top_k, total_experts=shape.total)
    others = sglang.engines(shape, weights) if sglang else {}
    del weights
    for tokens in token_counts:
        inputs = random_inputs(shape, tokens, batches_for(tokens))
        plan = plan_for(layer.device_name, shape, tokens)

        def ours(inputs: list[Tokens] = inputs, plan: Plan = plan) -> dict[str, Any]:
            us = median_us(whole_layer(layer), inputs)
            floor = floor_us(shape, inputs)
            return {"us": round(us, 2), "floor_us": round(floor, 2), "over_floor": round(us / floor, 2), "plan": plan}

        key = {"shape": name, "M": tokens}
        results.measure(key | {"engine": "lightship"}, ours)
        results.measure(key | {"engine": "lightship, its steps"}, lambda i=inputs, p=plan: step_times(layer, i, p))
        for engine, run in others.items():
            results.measure(key | {"engine": engine}, lambda i=inputs, r=run: r(i))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="tp8,ep8")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--sglang", type=Path, help="a W4AFP8 checkpoint directory; compare with SGLang")
    parser.add_argument("--no-errors", action="store_true")
    default = Path(os.environ.get("OUT", Path(__file__).parent)) / "moe_kernel.json"
    parser.add_argument("--out", type=Path, default=default)
    arguments = parser.parse_args()
    results = Results(arguments.out, arguments.seconds)
    sglang = None
    if arguments.sglang:
        from benchmarks import moe_kernel_sglang as sglang

        sglang.start(arguments.sglang)
    for name in arguments.shapes.split(","):
        shape = SHAPES[name]
        if not arguments.no_errors:
            errors(name, shape, results, sglang)
        torch.cuda.empty_cache()
        times(name, shape, results, [int(t) for t in arguments.tokens.split(",")], sglang)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
