"""At which degrees of tensor parallelism SGLang serves a model as W4AFP8, by the sizes of its family's declaration.

Each rank must hold whole heads, whole groups of 128 of the experts and whole 128x128 FP8 blocks of every other linear.
SGLang refuses blocks that are cut, and misaligns the experts' groups without an error.

    degrees_of(checkpoint.architecture.weights(checkpoint.config).values())
"""

from collections.abc import Iterable

from lightship.records import Degree
from lightship.weights import BLOCK, Weight

DEGREES = (1, 2, 4, 8, 16, 32)


def degrees_of(weights: Iterable[Weight]) -> list[Degree]:
    """Each degree from 1 to 32, and what stands in its way in each part of the model that has linears."""
    kinds: dict[tuple[str, str, tuple[int, ...]], Weight] = {}
    for weight in weights:
        if weight.linear:
            kinds.setdefault((weight.part, weight.name.split(".")[-2], weight.shape), weight)
    degrees = []
    for tp in DEGREES:
        obstacles: dict[str, list[str]] = {weight.part: [] for weight in kinds.values()}
        for weight in kinds.values():
            if not weight.divides_at(tp):
                obstacles[weight.part].append(_obstacle(weight, tp))
        degrees.append(Degree(tp=tp, obstacles=obstacles))
    return degrees


def _obstacle(weight: Weight, tp: int) -> str:
    assert weight.split is not None
    side = weight.shape[weight.split]
    if weight.pieces != side and not weight.whole_pieces_at(tp):
        return f"{weight.name}: {weight.pieces} heads / {tp}"
    parts = min(tp, weight.pieces)
    division = f"{side} / {parts} = {side / parts:g}" if parts > 1 else f"{side}"
    return f"{weight.name}: {division} is no multiple of {BLOCK}"
