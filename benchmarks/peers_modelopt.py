"""ModelOpt's worker for benchmarks/peers.py: `mtq.quantize` with INT4_BLOCKWISE_WEIGHT_ONLY_CFG (int4, group 128).

`max` is its calibrate-and-round, the algorithm that the configuration comes with; `mse` and `gptq` are the other
algorithms of the same version that keep the format, with their defaults. AWQ does not: it scales the inputs as well.
"""

import copy

import modelopt.torch.quantization as mtq
import torch
from peers_worker import PROJECTIONS, Batch, Layer, Rounded, run


def round_layer(layer: Layer, batches: list[Batch], method: str) -> Rounded:
    """Calibrate the layer's weight quantizers and round its weights in place."""
    config = copy.deepcopy(mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG)
    config["algorithm"] = {"method": method}
    with torch.no_grad():
        mtq.quantize(layer, config, forward_loop=lambda model: [model(*batch) for batch in batches])
        linears = {f"{e}.{p}": getattr(expert, p) for e, expert in enumerate(layer.experts) for p in PROJECTIONS}
        for linear in linears.values():
            linear.weight.data = linear.weight_quantizer(linear.weight).data

    def expanded() -> dict[str, torch.Tensor]:
        weights = {f"{name}.weight": linear.weight.data for name, linear in linears.items()}
        scales = {
            f"{name}.scale": (linear.weight_quantizer.amax / 7).reshape(len(linear.weight), -1).float()
            for name, linear in linears.items()
        }
        return weights | scales

    return expanded


if __name__ == "__main__":
    run(round_layer, ["nvidia-modelopt"])
