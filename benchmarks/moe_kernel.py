"""The fused W4AFP8 MoE layer on one GPU, beside SGLang's, at DeepSeek-V3's shapes.

    python -m benchmarks.moe_kernel [--sglang CHECKPOINT] [--table FILE] [--tokens 1,16] [--seconds 240]
    python -m benchmarks.moe_kernel_render benchmarks/moe_kernel.json

Times are medians over CUDA graphs, of the whole layer from hidden states and routing to combined output, in
microseconds; the floor is the bytes of the touched experts at 3 TB/s. Errors are relative norms against float32 with
the same int4 weights. `--sglang` names a W4AFP8 checkpoint directory, which SGLang 0.5.17 wants before a layer can be
used alone; `--table` a table that `lightship tune` has just written, in place of the shipped one. What is measured is
written after every step. `moe_kernel_render` makes tables and a plot of it, on any machine.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import torch

from lightship import __version__
from lightship.serving.moe.layer import Activations, FusedExperts
from lightship.serving.moe.timing import Tokens, batches_for, median_us, random_inputs, random_layer
from lightship.serving.moe.tune import calls_for
from lightship.serving.moe.tuning import SHAPES, Entry, Plan, Shape, plan_for, read_table
from lightship.w4afp8 import FP8_MAX, GROUP, dequantize_int4
from tests.serving import moe_reference

TOKENS = (1, 4, 8, 16, 64, 256, 1024, 4096)
BYTES_A_US = 3e6
ERROR_TOKENS = 1025
STEPS = "lightship, its steps"


class Results:
    """A list of measured rows, on disk after each."""

    def __init__(self, path: Path, seconds: float, plans: str) -> None:
        self.path, self.end, self.rows = path, time.monotonic() + seconds, list[dict[str, Any]]()
        self.head = {
            "command": "python -m benchmarks.moe_kernel " + " ".join(without_folder(word) for word in sys.argv[1:]),
            "device": torch.cuda.get_device_name(),
            "driver": driver(),
            "lightship": __version__,
            "torch": torch.__version__,
            "triton": version("triton"),
            "sglang": version("sglang") if find_spec("sglang") else None,
            "date": time.strftime("%Y-%m-%d"),
            "plans": plans,
        }

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
        self.path.write_text(json.dumps(self.head | {"rows": self.rows}, indent=1, default=str) + "\n")


def without_folder(word: str) -> str:
    """A word of the command; of an absolute path only the last part, as the rest says nothing elsewhere."""
    return Path(word).name if word.startswith("/") else word


def driver() -> str:
    """The version of the GPU's driver."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]


def floor_us(shape: Shape, inputs: list[Tokens]) -> float:
    """Microseconds in which the touched experts' weights and scales can be read."""
    experts = sum(len(e[e >= 0].unique()) for _, e, _ in inputs) / len(inputs)
    weights = 3 * shape.intermediate * shape.hidden
    return experts * (weights / 2 + weights / GROUP * 2) / BYTES_A_US


def step_times(layer: FusedExperts, inputs: list[Tokens], plan: Plan) -> dict[str, float]:
    """Each of the layer's steps alone, in microseconds."""
    calls = calls_for(layer, inputs, plan)
    steps = {"routing": layer.route, "gate_up": layer.gate_up, "down_and_combine": layer.down}
    found = {name: median_us(lambda call, step=step: step(call, plan), calls) for name, step in steps.items()}
    return {name: round(us, 2) for name, us in found.items()}


def static_scales(weights: dict[str, torch.Tensor], given: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """Input scales as calibration finds them: the largest activations / 448, the second with room to twice its size."""
    x_TH, experts_TK, _ = given
    expert = int(experts_TK[experts_TK >= 0][0])
    token, _ = (experts_TK == expert).nonzero(as_tuple=True)
    gate, up = (x_TH[token].float() @ dequantize_int4(weights["w13"][expert], weights["w13_scale"][expert]).T).chunk(
        2, -1
    )
    largest = (torch.nn.functional.silu(gate) * up).abs().max()
    return x_TH.abs().max().float() / FP8_MAX, 2 * largest / FP8_MAX


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return round(moe_reference.relative_error(got, want), 5)


def whole_layer(layer: FusedExperts, plan: Plan | None = None) -> Callable[[Tokens], torch.Tensor]:
    """The call that is timed."""
    return lambda given: layer(*given, plan=plan)


def errors(name: str, shape: Shape, results: Results) -> None:
    """Our relative errors, and whether a second call gives the same bits."""
    weights = random_layer(shape)
    (given,) = random_inputs(shape, ERROR_TOKENS, 1, seed=7)
    want, scales = moe_reference.reference(weights, *given, rounding="none"), static_scales(weights, given)

    def ours(activations: Activations) -> dict[str, Any]:
        layer = moe_reference.fused(
            weights, w13_input_scale=scales[0], w2_input_scale=scales[1], activations=activations, top_k=shape.top_k,
            total_experts=shape.total,
        )  # fmt: skip
        got, again = layer(*given), layer(*given)
        return {"relative_error": relative_error(got, want), "same_twice": bool(torch.equal(got, again))}

    for activations in ("dynamic", "static"):
        key = {"shape": name, "M": ERROR_TOKENS, "engine": f"lightship {activations}"}
        results.measure(key, lambda a=activations: ours(a))


class Case:
    """A shape's layers, ours and others."""

    def __init__(self, name: str, shape: Shape, table: tuple[Entry, ...] | None) -> None:
        self.name, self.shape, self.table = name, shape, table
        self.layer = FusedExperts(**random_layer(shape), top_k=shape.top_k, total_experts=shape.total)
        self.others: dict[str, Callable[[list[Tokens]], dict[str, Any]]] = {}

    def measure(self, engine: str, tokens: int, results: Results) -> None:
        """One engine at one size, or our steps."""
        inputs = random_inputs(self.shape, tokens, batches_for(tokens))
        plan = plan_for(self.layer.device_name, self.shape, tokens, self.table)

        def ours() -> dict[str, Any]:
            us, floor = median_us(whole_layer(self.layer, plan), inputs), floor_us(self.shape, inputs)
            plain = msgspec.to_builtins(plan)
            return {"us": round(us, 2), "floor_us": round(floor, 2), "over_floor": round(us / floor, 2), "plan": plain}

        def of_steps() -> dict[str, Any]:
            return step_times(self.layer, inputs, plan)

        run = {"lightship": ours, STEPS: of_steps}.get(engine) or (lambda: self.others[engine](inputs))
        results.measure({"shape": self.name, "M": tokens, "engine": engine}, run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="tp8,ep8")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--sglang", type=Path, help="a W4AFP8 checkpoint directory; compare with SGLang")
    parser.add_argument("--table", type=Path, help="a table of `lightship tune`, in place of the shipped one")
    parser.add_argument("--no-errors", action="store_true")
    default = Path(os.environ.get("OUT", Path(__file__).parent)) / "moe_kernel.json"
    parser.add_argument("--out", type=Path, default=default)
    arguments = parser.parse_args()
    tuned = read_table(arguments.table) if arguments.table else None
    results = Results(arguments.out, arguments.seconds, arguments.table.name if arguments.table else "shipped")
    token_counts = [int(t) for t in arguments.tokens.split(",")]
    cases = [Case(name, SHAPES[name], tuned) for name in arguments.shapes.split(",")]
    measure(cases, ("lightship", STEPS), token_counts, results)
    for case in cases if not arguments.no_errors else ():
        errors(case.name, case.shape, results)
    if arguments.sglang:
        from benchmarks import moe_kernel_sglang as sglang

        results.measure({"engine": "sglang", "shape": "", "M": 0}, lambda: sglang.start(arguments.sglang))
        for case in cases:
            case.others = sglang.engines(case.shape, random_layer(case.shape))
        for engine in cases[0].others:
            measure(cases, (engine,), token_counts, results)
            for case in cases if not arguments.no_errors else ():
                sglang.error(engine, case, results)


def measure(cases: list[Case], engines: tuple[str, ...], token_counts: list[int], results: Results) -> None:
    """These engines at every shape and size."""
    for case in cases:
        for tokens in token_counts:
            for engine in engines:
                case.measure(engine, tokens, results)


if __name__ == "__main__":
    main()
