"""`lightship tune`: time candidate plans on this GPU and write the fastest as a table.

The two products are timed alone for each height of tile, and the best pair of each height together, as a whole layer.
"""

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
import triton

from lightship.errors import ServingError
from lightship.files import write_text
from lightship.serving.moe import down, gate_up, routing
from lightship.serving.moe.layer import FusedExperts
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
    """Time candidates: {"block_m", "direct", "gate_up" or "down", "us"} each, then {"plan", "layer_us"} of the best."""
    tokens = len(inputs[0][0])
    modes = [(True, 16)] if tokens <= 4 else []
    if tokens > 1:
        rows = layer.shape.rows(tokens)
        modes += [(False, m) for m in (16, 32, 64, 128) if m // 8 <= max(rows, 2) and m * 6 >= rows]
    for direct, block_m in modes:
        steps = Steps(layer, inputs, block_m, direct)
        best: dict[str, Any] = {}
        for kind, candidates in (("gate_up", gate_ups(tokens, block_m)), ("down", downs(layer.shape, block_m, direct))):
            least = float("inf")
            for how in candidates:
                us = steps.time(how)
                yield {"block_m": block_m, "direct": direct, kind: how, "us": round(us, 2)}
                if us < least:
                    least, best[kind] = us, how
        plan = Plan(block_m, direct, best["gate_up"], best["down"])
        us = median_us(partial(_whole, layer, plan), inputs)
        yield {"plan": plan, "layer_us": round(us, 2)}


def _whole(layer: FusedExperts, plan: Plan, given: Tokens) -> torch.Tensor:
    return layer(*given, plan=plan)


def gate_ups(tokens: int, block_m: int) -> list[GateUp]:
    """Candidates for the first product."""
    if block_m >= 128:
        return [GateUp(1, 8, 3)]
    if tokens <= 8:
        splits = {1: (4, 7, 14), 2: (2, 4, 7), 4: (1, 2, 4)}.get(tokens, (1, 2))
        return [GateUp(split, warps, 3) for split in splits for warps in (4, 8)]
    return [GateUp(1, warps, stages) for warps in ((4, 8) if block_m == 16 else (8,)) for stages in (2, 3, 4)]


def downs(shape: Shape, block_m: int, direct: bool) -> list[Down]:
    """Candidates for the second product."""
    if direct:
        return [Down(64, 1, 4, 3), Down(64, 1, 4, 4), Down(64, 1, 4, 6), Down(128, 1, 4, 4), Down(128, 1, 8, 4)]
    warps = (8,) if block_m >= 128 else (4, 8)
    if shape.intermediate <= 2 * GROUP:
        walks = (7, 14, 28) if block_m == 16 else (4, 14)
        found = [Down(128, walk, w, 3) for walk in walks for w in warps]
        return found + [Down(128, walk, 4, 4) for walk in walks if block_m == 16]
    stages = (3, 4) if block_m < 64 else (2, 3)
    found = [Down(128, 1, w, s) for w in warps for s in stages]
    return found + ([Down(64, 1, 4, 4)] if block_m < 64 else [])


class Steps:
    """The two products of a layer's call, each to be run alone on the same inputs."""

    def __init__(self, layer: FusedExperts, inputs: list[Tokens], block_m: int, direct: bool) -> None:
        self.layer, self.block_m, self.direct = layer, block_m, direct
        self.made = [self._made(given) for given in inputs]
        pairs = 1 if direct else inputs[0][1].numel()
        self.y_PH = torch.zeros(pairs, layer.shape.hidden, dtype=torch.bfloat16, device="cuda")

    def _made(self, given: Tokens) -> dict[str, Any]:
        x_TH, experts_TK, weights_TK = given
        (tokens, hidden), inter, pairs = x_TH.shape, self.layer.shape.intermediate, experts_TK.numel()
        made: dict[str, Any] = {
            "x": x_TH,
            "experts": experts_TK,
            "weights": weights_TK,
            "q": x_TH.new_empty(tokens, hidden, dtype=torch.float8_e4m3fn),
            "scale": x_TH.new_empty(tokens, dtype=torch.float32),
            "h": torch.zeros(pairs, inter, device=x_TH.device).to(torch.float8_e4m3fn),
            "h_scale": torch.ones(pairs, inter // GROUP, device=x_TH.device),
            "out": torch.empty_like(x_TH),
        }
        made["routed"] = self.route(made)
        return made

    def route(self, made: dict[str, Any]) -> routing.Routed | None:
        """The first step."""
        given = made["x"], self.layer.input_scales[0], made["scale"], made["q"]
        if self.direct:
            routing.quantize(*given)
            return None
        return routing.quantize_and_sort(*given, made["experts"], self.layer.shape.experts, self.block_m)

    def gate_up(self, made: dict[str, Any], how: GateUp) -> None:
        """The first product."""
        layer = self.layer
        gate_up.gate_up(
            made["q"], made["scale"], layer.w13, layer.w13_scale, made["experts"], made["routed"], self.block_m, how,
            layer.input_scales[1], made["h"], made["h_scale"],
        )  # fmt: skip

    def down(self, made: dict[str, Any], how: Down) -> None:
        """The second product, and its sum where that is part of it."""
        w2 = made["h"], made["h_scale"], self.layer.w2, self.layer.w2_scale
        if self.direct:
            down.down_and_combine(*w2, made["experts"], made["weights"], how, made["out"])
        else:
            down.down(*w2, made["weights"], made["routed"], self.block_m, how, self.y_PH)

    def combine(self, made: dict[str, Any]) -> None:
        """The sum."""
        down.combine(self.y_PH, made["experts"], self.layer.shape.experts, made["out"])

    def time(self, how: GateUp | Down) -> float:
        """Median microseconds of one product; infinite if the GPU cannot run it so."""

        def run(made: dict[str, Any]) -> None:
            if isinstance(how, GateUp):
                self.gate_up(made, how)
            else:
                self.down(made, how)

        try:
            return median_us(run, self.made, replays=10)
        except triton.runtime.errors.OutOfResources:
            return float("inf")
