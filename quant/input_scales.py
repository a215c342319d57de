"""The static activation scales of a W4AFP8 checkpoint: SGLang takes a missing one for 1.0 and says nothing."""

from collections.abc import Iterator

import torch

from lightship.checkpoint import Checkpoint, TensorReader
from lightship.progress import tracked
from lightship.quant.findings import Findings
from lightship.quant.loadable import FLOATS, INPUT_SCALES
from lightship.records import Check

LARGEST_DIFFERENCE = 1e-5
"""Between w1's and w3's input scale as bf16: beyond it the loader raises an error."""


def check_input_scales(checkpoint: Checkpoint, layers: list[str], exact: Findings, *, ours: bool) -> list[Check]:
    """Is each input scale there and calibrated, and does a layer share one?

    Args:
        exact: takes those that bf16 does not hold.
        ours: lightship wrote the checkpoint. It never writes scales that differ within a layer or that bf16 does not
            hold, so they are faults; another tool's are warnings, for SGLang serves them.
    """
    scales, shared = Findings("input scales"), Findings("one scale a layer")
    note_inexact, note_unequal = (exact.fail, shared.fail) if ours else (exact.warn, shared.warn)
    reader = checkpoint.reader()
    read = 0
    for layer in tracked(layers, "input scales"):
        values = _layer_scales(checkpoint, reader, layer, scales)
        read += len(values)
        if values and set(values.values()) == {1.0}:
            scales.fail(f"{layer}: every input scale is 1.0, a placeholder that was never calibrated")
            continue
        rounded = {key: float(torch.tensor(value).bfloat16()) for key, value in values.items()}
        for (expert, w), value in values.items():
            name = f"{layer}.experts.{expert}.{w}.input_scale"
            kept = rounded[expert, w]
            if value == 1.0:
                scales.fail(f"{name} is 1.0, SGLang's placeholder: it was never calibrated")
            if value != kept:
                note_inexact(f"{name} is {value:.9g}, which bf16 cannot hold: SGLang takes {kept:.9g}")
            w3 = rounded.get((expert, "w3"), kept)
            if w == "w1" and abs(kept - w3) > LARGEST_DIFFERENCE:
                scales.fail(f"{layer}.experts.{expert}: w1's input scale is {kept:.6g}, w3's {w3:.6g}; SGLang stops")
        for text in _unequal(layer, rounded):
            note_unequal(text)
    return [
        scales.check(f"{read:,}: each there, positive, calibrated; w1 = w3"),
        shared.check("one for w1 and w3, one for w2: TP and EP compute the same"),
    ]


Scales = dict[tuple[int, str], float]
"""(expert, w1 | w2 | w3) -> input scale."""


def _layer_scales(checkpoint: Checkpoint, reader: TensorReader, layer: str, scales: Findings) -> Scales:
    """A layer's input scales, without those that are missing or unusable, which are faults."""
    values = {}
    for expert in range(checkpoint.dimensions.n_routed_experts):
        stem = f"{layer}.experts.{expert}"
        for projection, w in INPUT_SCALES.items():
            value = _input_scale(checkpoint, reader, f"{stem}.{w}.input_scale", f"{stem}.{projection}", scales)
            if value is not None:
                values[expert, w] = value
    return values


def _unequal(layer: str, rounded: Scales) -> Iterator[str]:
    for inputs in (("w1", "w3"), ("w2",)):
        found = sorted((value, expert) for (expert, w), value in rounded.items() if w in inputs)
        if found and found[0][0] != found[-1][0]:
            (least, low), (most, high) = found[0], found[-1]
            yield (
                f"{layer}: {'/'.join(inputs)} from {least:.6g} (expert {low}) to {most:.6g} (expert {high}): "
                "TP takes the largest of all, EP that of a rank's own, so they differ"
            )


def _input_scale(
    checkpoint: Checkpoint, reader: TensorReader, name: str, projection: str, scales: Findings
) -> float | None:
    """The scale's value; None, and a fault, if there is none that can be used."""
    info = checkpoint.tensors.get(name)
    if info is None:
        other = f"{projection}.input_scale"
        hint = f"; SGLang does not read {other}" if other in checkpoint.tensors else ""
        scales.fail(f"{name} is missing: SGLang leaves it at 1.0{hint}")
        return None
    if info.shape not in ((), (1,)) or info.dtype not in FLOATS:
        scales.fail(f"{name} is {info.dtype} of shape {list(info.shape)}, not one float")
        return None
    value = float(reader.read(name))
    if not 0 < value < float("inf"):
        scales.fail(f"{name} is {value}, not positive and finite")
        return None
    return value
