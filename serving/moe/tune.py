"""`lightship tune`: time candidate plans on this GPU and write the fastest as a table.

The first product is timed alone, and the second with the sum; then the best of each together, as a whole layer.
Candidates that never came near the best are not tried.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
import triton

from lightship.errors import ServingError
from lightship.files import write_text
from lightship.serving.moe.layer import Call, FusedExperts
from lightship.serving.moe.timing import Tokens, batches_for, median_us, random_inputs, random_layer
from lightship.serving.moe.tuning import TOKENS, Down, Entry, GateUp, Measured, Plan, Shape, Table
from lightship.w4afp8 import GROUP


def tune(shapes: list[Shape], out: Path, token_counts: tuple[int, ...] = TOKENS) -> Table:
    """Measure, and write the table after every number of tokens.

    Raises:
        ServingError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise ServingError("tune needs a GPU and sees none; run it on the machine that will serve")
    table = Table(torch.cuda.get_device_name(), triton.__version__, time.strftime("%Y-%m-%d"), [])
    for shape in shapes:
        layer = FusedExperts(*random_layer(shape).values(), top_k=shape.top_k, total_experts=shape.total)
        table.entries.append(Entry(shape, []))
        for tokens in token_counts:
            best = None
            for step in walk_plans(layer, random_inputs(shape, tokens, batches_for(tokens))):
                print(msgspec.json.encode({"tokens": tokens} | step).decode(), flush=True)
                if "layer_us" in step and (best is None or step["layer_us"] < best.us):
                    best = Measured(tokens, step["plan"], step["layer_us"])
            assert best is not None
            table.entries[-1].measured.append(best)
            write_text(out, msgspec.json.format(msgspec.json.encode(table), indent=1).decode() + "\n")
    return table


def walk_plans(layer: FusedExperts, inputs: list[Tokens]) -> Iterator[dict[str, Any]]:
    """Time candidates: {"direct", "gate_up" or "down", "us"} each, then the best as {"plan", "layer_us"}."""
    tokens = len(inputs[0][0])
    for direct in [True] * (tokens <= 4) + [False] * (tokens > 2):
        plan = Plan(direct=direct)
        for product, hows in (("gate_up", gate_ups), ("down", downs)):
            times = {}
            for how in hows(layer.shape, tokens, direct):
                times[how] = _time(layer, inputs, msgspec.structs.replace(plan, **{product: how}), product)
                yield {"direct": direct, product: how, "us": round(times[how], 2)}
            plan = msgspec.structs.replace(plan, **{product: min(times, key=lambda how: times[how])})
        yield {"plan": plan, "layer_us": round(median_us(partial(_whole, layer, plan), inputs), 2)}


def _whole(layer: FusedExperts, plan: Plan, given: Tokens) -> torch.Tensor:
    return layer(*given, plan=plan)


def heights(rows: float) -> list[int]:
    """Candidate heights of tiles, where an expert has so many rows on average."""
    ranges = {16: (0, 16), 32: (8, float("inf")), 64: (24, float("inf"))}
    return [height for height, (least, most) in ranges.items() if least <= rows <= most]


def gate_ups(shape: Shape, tokens: int, direct: bool) -> list[GateUp]:
    """Candidates for the first product."""
    if direct:
        return [GateUp(16, split) for split in {1: (7,), 2: (4, 7)}.get(tokens, (2, 4))]
    candidates = {
        16: [GateUp(16, warps=4), GateUp(16, split=2, warps=4) if tokens <= 16 else GateUp(16, warps=4, stages=2)],
        32: [GateUp(32), GateUp(32, short=16)],
        64: [GateUp(64, short=short, ordered=True) for short in (0, 16, 32)],
    }
    return [how for height in heights(shape.rows(tokens)) for how in candidates[height]]


def downs(shape: Shape, tokens: int, direct: bool) -> list[Down]:
    """Candidates for the second product."""
    if direct:
        return [Down(16, 64, stages=stages) for stages in (3, 4)]
    if shape.intermediate > 2 * GROUP:
        walks = {16: (1,), 32: (1, 2, 4), 64: ()}
        candidates = {
            height: [Down(height, walk=walk, stages=stages) for walk in walks[height] for stages in (3, 4)]
            for height in walks
        }
        candidates[16].append(Down(16, 64, stages=4))
    else:
        candidates = {
            16: [Down(16, walk=walk) for walk in (7, 14)],
            32: [Down(32, walk=walk, stages=stages) for walk in (14, 28) for stages in (3, 4)],
            64: [Down(64, walk=28)],
        }
    return [how for height in heights(shape.rows(tokens)) for how in candidates[height]]


def calls_for(layer: FusedExperts, inputs: list[Tokens], plan: Plan) -> list[Call]:
    """Calls whose steps can each be run alone: routed as the plan says, with an intermediate of zeros."""
    calls = [layer.begin(*given, torch.empty_like(given[0])) for given in inputs]
    for call in calls:
        call.h_PI.view(torch.uint8).zero_()
        call.h_scale_PG.fill_(1)
        call.routed = layer.route(call, plan)
    return calls


def _time(layer: FusedExperts, inputs: list[Tokens], plan: Plan, product: str) -> float:
    """Median microseconds of a product; infinite if this GPU and compiler cannot run it so."""
    step: Callable[[Call, Plan], None] = getattr(layer, product)
    try:
        return median_us(lambda call: step(call, plan), calls_for(layer, inputs, plan), replays=10)
    except (triton.runtime.errors.OutOfResources, triton.CompilationError, RuntimeError) as error:
        print(f"not run: {plan}: {error!r:.200}", flush=True)
        return float("inf")
