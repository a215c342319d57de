"""Times of GPU work inside CUDA graphs, and the inputs that they are measured on."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from lightship.serving.moe.tuning import Shape
from lightship.w4afp8 import GROUP

Input = TypeVar("Input")
Tokens = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""x_TH, experts_TK, weights_TK."""


def median_us(run: Callable[[Input], object], inputs: Sequence[Input], replays: int = 20) -> float:
    """Median microseconds of run(input), over replays of a graph in which all inputs take their turn."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(inputs[0])  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            kept = [run(i) for i in inputs]
        for _ in range(3):
            graph.replay()
        times = []
        for _ in range(replays):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / len(inputs))
    del kept
    return sorted(times)[len(times) // 2]


def random_layer(shape: Shape, seed: int = 1) -> dict[str, torch.Tensor]:
    """Random int4 weights and scales on the GPU, as `FusedExperts` takes them."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def weight(outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
        packed = torch.randint(
            -128, 128, (shape.experts, outputs, inputs // 2), dtype=torch.int8, device="cuda", generator=generator
        )
        size = torch.rand(shape.experts, outputs, inputs // GROUP, device="cuda", generator=generator) + 0.5
        return packed, (size * (inputs**-0.5 / 4.6)).bfloat16()

    w13, w13_scale = weight(2 * shape.intermediate, shape.hidden)
    w2, w2_scale = weight(shape.hidden, shape.intermediate)
    return {"w13": w13, "w13_scale": w13_scale, "w2": w2, "w2_scale": w2_scale}


def random_inputs(shape: Shape, tokens: int, count: int, seed: int = 0) -> list[Tokens]:
    """`count` batches on the GPU, routed evenly over all experts of the model; those of other ranks are -1."""
    generator = torch.Generator("cuda").manual_seed(seed * 100003 + tokens)
    batches = []
    for _ in range(count):
        x_TH = torch.randn(tokens, shape.hidden, device="cuda", generator=generator).bfloat16()
        score = torch.rand(tokens, shape.total, device="cuda", generator=generator)
        value, chosen = score.topk(shape.top_k, dim=-1)
        chosen = torch.where(chosen < shape.experts, chosen, -1).int()
        batches.append((x_TH, chosen, (value / value.sum(dim=-1, keepdim=True)).float()))
    return batches


def batches_for(tokens: int) -> int:
    """How many batches a graph should hold: enough that weights of small ones are not found in the L2 cache again."""
    return 16 if tokens <= 256 else 4
