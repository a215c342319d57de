"""`lightship tune`: time candidate plans on this GPU and write the fastest as a table.

The first product is timed alone, and the second with the sum, for each height of tile; then the best pair of each
height together, as a whole layer. Candidates that never came near the best are not tried.
"""

import math
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
    """Time candidates: {"block_m", "gate_up" or "down", "chunks", "us"} each, then the best as {"plan", "layer_us"}."""
    tokens = len(inputs[0][0])
    modes = [(True, 16)] if tokens <= 4 else []
    if tokens > 2:
        modes += [(False, block_m) for block_m in heights(layer.shape.rows(tokens))]
    for direct, block_m in modes:
        calls = calls_for(layer, inputs, Plan(block_m, direct))
        plans = [Plan(block_m, direct, gate_up=how) for how in gate_ups(tokens, block_m, direct)]
        times = {plan.gate_up: _time(layer.gate_up, calls, plan) for plan in plans}
        yield from ({"block_m": block_m, "gate_up": how, "us": round(us, 2)} for how, us in times.items())
        best = Plan(block_m, direct, gate_up=min(times, key=lambda how: times[how]))
        plans = [
            msgspec.structs.replace(best, down=how, chunks=c) for how, c in downs(layer.shape, tokens, block_m, direct)
        ]
        seconds = {plan: _time(layer.down, calls, plan) for plan in plans}
        for plan, us in seconds.items():
            yield {"block_m": block_m, "down": plan.down, "chunks": plan.chunks, "us": round(us, 2)}
        best = min(seconds, key=lambda plan: seconds[plan])
        yield {"plan": best, "layer_us": round(median_us(partial(_whole, layer, best), inputs), 2)}


def _whole(layer: FusedExperts, plan: Plan, given: Tokens) -> torch.Tensor:
    return layer(*given, plan=plan)


def heights(rows: float) -> list[int]:
    """Candidate heights of tiles, where an expert has so many rows on average."""
    ranges = {16: (0, 16), 32: (8, 128), 64: (24, float("inf"))}
    return [height for height, (least, most) in ranges.items() if least <= rows <= most]


def gate_ups(tokens: int, block_m: int, direct: bool) -> list[GateUp]:
    """Candidates for the first product."""
    if direct:
        return [GateUp(split, 8, 3) for split in {1: (7,), 2: (4, 7)}.get(tokens, (2, 4))]
    few = GateUp(1, 8, 3, ordered=True, registers=128)
    if block_m == 16:
        return [GateUp(1, 4, 3), GateUp(2, 4, 3) if tokens <= 16 else GateUp(1, 4, 2), few]
    if block_m == 32:
        return [GateUp(1, 8, 3), few]
    return [GateUp(1, 8, 3), GateUp(1, 8, 3, tma=True), GateUp(1, 8, 3, ordered=True), GateUp(1, 8, 3, True, True)]


def downs(shape: Shape, tokens: int, block_m: int, direct: bool) -> list[tuple[Down, int]]:
    """Candidates for the second product, and the chunks in which it takes turns with the sum."""
    if direct:
        return [(Down(64, 1, 4, 3), 1), (Down(64, 1, 4, 4), 1)]
    narrow = shape.intermediate <= 2 * GROUP
    if tokens < 512:
        if narrow:
            return [(Down(128, walk, 4, 3), 1) for walk in ((7, 14, 28) if block_m == 16 else (4, 14))]
        return [(Down(128, 1, 4, 3), 1), (Down(128, 1, 8, 3), 1), (Down(64, 1, 4, 4), 1)]
    between = tokens * shape.top_k * shape.experts / shape.total * shape.hidden * 2
    chunks = sorted({min(28, math.ceil(between / size)) for size in (8 << 20, 16 << 20, 32 << 20, 64 << 20)} | {1})
    hows = (
        [Down(128, walk, 4, 3) for walk in (14, 4, 2)]
        if narrow
        else [Down(128, 1, 4, 3), Down(128, 1, 8, 3), Down(64, 1, 4, 3)]
    )
    return [(how, c) for c in chunks for how in hows if shape.hidden // c >= how.block_n * how.walk or c == 1]


def calls_for(layer: FusedExperts, inputs: list[Tokens], plan: Plan) -> list[Call]:
    """Calls whose steps can each be run alone: routed as the plan says, with an intermediate of zeros."""
    calls = [layer.begin(*given, torch.empty_like(given[0])) for given in inputs]
    for call in calls:
        call.h_PI.view(torch.uint8).zero_()
        call.h_scale_PG.fill_(1)
        call.routed = layer.route(call, plan)
    return calls


def _time(step: Callable[[Call, Plan], None], calls: list[Call], plan: Plan) -> float:
    """Median microseconds of a step; infinite if this GPU and compiler cannot run it so."""
    try:
        return median_us(lambda call: step(call, plan), calls, replays=10)
    except (triton.runtime.errors.OutOfResources, triton.CompilationError, RuntimeError) as error:
        print(f"not run: {plan}: {error!r:.200}", flush=True)
        return float("inf")
