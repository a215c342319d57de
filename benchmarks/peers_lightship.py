"""lightship's worker for benchmarks/peers.py: an expert at a time, as `lightship quantize` does.

The inputs of gate and up share one Hessian; down's comes from the intermediates of the rounded gate and up.
"""

from collections.abc import Iterable

import torch
from peers_worker import Batch, Expert, Layer, Rounded, run

from lightship.experts import gated
from lightship.quant.rounding import Int4Weight, Rounding, rounding_for
from lightship.recipe import RoundingSettings
from lightship.w4afp8 import dequantize_int4, pack_int4

METHODS = {
    "absmax": RoundingSettings(method="absmax"),
    "mse": RoundingSettings(method="mse"),
    "gptq": RoundingSettings(method="gptq", sweeps=0),
    "gptq-sweeps": RoundingSettings(method="gptq", sweeps=2),
}


def round_layer(layer: Layer, batches: list[Batch], method: str) -> Rounded:
    """Round every expert; what is kept is packed int4 and bf16 scales, as on disk."""
    settings = METHODS[method]
    rounding = rounding_for(settings)
    packed: dict[str, Int4Weight] = {}
    with torch.inference_mode():
        for e, expert in enumerate(layer.experts):
            seen = [(b.x_TH, b.tokens_of_experts[e]) for b in batches] if settings.method == "gptq" else []
            packed |= {f"{e}.{name}": weight for name, weight in _round_expert(expert, seen, rounding).items()}

    def expanded() -> dict[str, torch.Tensor]:
        weights = {f"{name}.weight": dequantize_int4(w.q_OI, w.scale_OG) for name, w in packed.items()}
        return weights | {f"{name}.scale": w.scale_OG.float() for name, w in packed.items()}

    return expanded


def _round_expert(
    expert: Expert, seen: list[tuple[torch.Tensor, torch.Tensor]], rounding: Rounding
) -> dict[str, Int4Weight]:
    """Round gate and up, then down, against the tokens seen: pairs of tokens [T, H] and which of them are the expert's.

    Without tokens, the method needs none.
    """
    w13 = rounding(torch.cat([expert.gate.weight, expert.up.weight]), _hessian(x_TH[t] for x_TH, t in seen))
    packed13 = pack_int4(w13.q_OI)
    w13_2IH = dequantize_int4(packed13, w13.scale_OG)

    def intermediate(x_tH: torch.Tensor) -> torch.Tensor:
        return gated(x_tH @ w13_2IH.T)

    w2 = rounding(expert.down.weight.data, _hessian(intermediate(x_TH[t]) for x_TH, t in seen))
    (gate, up), (gate_scale, up_scale) = packed13.chunk(2), w13.scale_OG.chunk(2)
    return {
        "gate": Int4Weight(gate, gate_scale),
        "up": Int4Weight(up, up_scale),
        "down": Int4Weight(pack_int4(w2.q_OI), w2.scale_OG),
    }


def _hessian(inputs: Iterable[torch.Tensor]) -> torch.Tensor | None:
    """Sum of x xᵀ over batches of inputs [t, in]; None without a batch."""
    hessian_II = None
    for x_tI in inputs:
        hessian_II = x_tI.T @ x_tI if hessian_II is None else hessian_II.addmm_(x_tI.T, x_tI)
    return hessian_II


if __name__ == "__main__":
    run(round_layer, ["lightship"])
