"""The static activation scales of a W4AFP8 checkpoint: SGLang takes a missing one for 1.0 and says nothing."""

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
    count = checkpoint.dimensions.n_routed_experts
    read = 0
    for layer in tracked(layers, "input scales"):
        values: dict[str, float] = {}
        for expert in range(count):
            for projection, w in INPUT_SCALES.items():
                name = f"{layer}.experts.{expert}.{w}.input_scale"
                value = _input_scale(checkpoint, reader, name, f"{layer}.experts.{expert}.{projection}", scales)
                if value is not None:
                    values[f"{expert}.{w}"] = value
        read += len(values)
        rounded = {key: float(torch.tensor(value).bfloat16()) for key, value in values.items()}
        if values and set(values.values()) == {1.0}:
            scales.fail(f"{layer}: every input scale is 1.0, a placeholder that was never calibrated")
            continue
        for key, value in values.items():
            name = f"{layer}.experts.{key}.input_scale"
            if value == 1.0:
                scales.fail(f"{name} is 1.0, SGLang's placeholder: it was never calibrated")
            if value != rounded[key]:
                note_inexact(f"{name} is {value:.9g}, which bf16 cannot hold: SGLang takes {rounded[key]:.9g}")
        for expert in range(count):
            w1, w3 = rounded.get(f"{expert}.w1"), rounded.get(f"{expert}.w3")
            if w1 is not None and w3 is not None and abs(w1 - w3) > LARGEST_DIFFERENCE:
                scales.fail(f"{layer}.experts.{expert}: w1's input scale is {w1:.6g}, w3's {w3:.6g}; SGLang refuses it")
        for inputs in (("w1", "w3"), ("w2",)):
            found = {key: value for key, value in rounded.items() if key.split(".")[1] in inputs}
            if len(set(found.values())) > 1:
                least, most = min(found, key=found.__getitem__), max(found, key=found.__getitem__)
                note_unequal(
                    f"{layer}: {'/'.join(inputs)} from {found[least]:.6g} (expert {least}) to {found[most]:.6g} "
                    f"(expert {most}): TP takes the largest of all, EP that of a rank's own, so they differ"
                )
    return [
        scales.check(f"{read:,}: each there, positive, calibrated; w1 = w3"),
        shared.check("one for w1 and w3, one for w2: TP and EP compute the same"),
    ]


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
