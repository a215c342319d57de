"""llm-compressor's worker for benchmarks/peers.py: its GPTQModifier through its session and basic pipeline.

Scheme W4A16 (int4, symmetric, group 128); everything else as it comes: dampening 0.01, block size 128, act-order
`static`. `gptq` takes the scales as they come, `gptq-mse` those of its MSE observer.
"""

import torch
from llmcompressor.core import active_session, reset_session
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.pipelines.basic import run_calibration
from loguru import logger
from peers_worker import PROJECTIONS, Batch, Layer, Rounded, run

OBSERVERS = {"gptq": None, "gptq-mse": "memoryless_mse"}


def round_layer(layer: Layer, batches: list[Batch], method: str) -> Rounded:
    """Calibrate and round the layer's linears in place."""
    reset_session()
    session = active_session()
    modifier = GPTQModifier(targets=["Linear"], scheme="W4A16", weight_observer=OBSERVERS[method])
    session.initialize(model=layer, recipe=[modifier])
    run_calibration(layer, [batch._asdict() for batch in batches])
    session.finalize()

    def expanded() -> dict[str, torch.Tensor]:
        linears = {f"{e}.{p}": getattr(expert, p) for e, expert in enumerate(layer.experts) for p in PROJECTIONS}
        weights = {f"{name}.weight": linear.weight.data for name, linear in linears.items()}
        return weights | {f"{name}.scale": linear.weight_scale.data for name, linear in linears.items()}

    return expanded


if __name__ == "__main__":
    logger.remove()
    run(round_layer, ["llmcompressor", "compressed-tensors", "transformers"])
