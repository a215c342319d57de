"""What the worker of every tool shares in benchmarks/peers.py: the layer it reads, how it is measured, what it writes.

Needs torch and safetensors alone, so that it runs in any tool's environment. A worker rounds a layer of random numbers
first, so that lazy imports and first calls are not measured.

    python benchmarks/peers_lightship.py CASE.safetensors OUT.safetensors METHOD
"""

import ctypes
import gc
import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

THREADS = 2
BATCH_TOKENS = 8192
PROJECTIONS = ("gate", "up", "down")


class Expert(nn.Module):
    """One expert: gate and up [I, H], down [H, I], float32."""

    def __init__(self, gate_IH: torch.Tensor, up_IH: torch.Tensor, down_HI: torch.Tensor) -> None:
        super().__init__()
        self.gate, self.up, self.down = (_linear(w_OI) for w_OI in (gate_IH, up_IH, down_HI))

    def forward(self, x_tH: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x_tH)) * self.up(x_tH))


class Layer(nn.Module):
    """The routed experts; the forward only runs each on the tokens that the router sent it."""

    def __init__(self, experts: list[Expert]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)

    def forward(self, x_TH: torch.Tensor, tokens_of_experts: list[torch.Tensor]) -> None:
        for expert, tokens_t in zip(self.experts, tokens_of_experts, strict=True):
            expert(x_TH[tokens_t])


class Batch(NamedTuple):
    """Calibration tokens float32 [T, H], and for each expert which of them it gets, int64 [t]: `Layer`'s arguments."""

    x_TH: torch.Tensor
    tokens_of_experts: list[torch.Tensor]


Rounded = Callable[[], dict[str, torch.Tensor]]
"""Gives `{expert}.{projection}.weight`, expanded float32 [out, in], and `.scale` [out, in / 128]; not measured."""
RoundLayer = Callable[[Layer, list[Batch], str], Rounded]
"""(layer, calibration tokens, method) -> Rounded; this is what is measured."""


def run(round_layer: RoundLayer, packages: list[str]) -> None:
    """Measure `round_layer` on the case named on the command line and write its weights and its costs.

    The costs go to stdout's last line as JSON: seconds of the wall clock and of the processor, bytes of the peak of
    resident memory above what is resident once the imports are done and the layer and its tokens are loaded.
    """
    case, out, method = sys.argv[1:]
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    practice = Layer([Expert(torch.randn(256, 128), torch.randn(256, 128), torch.randn(128, 256))])
    round_layer(practice, [Batch(torch.randn(512, 128), [torch.arange(512)])], method)()
    del practice
    layer, batches = _read(Path(case))
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # from here on VmHWM is the peak of what follows
    before = _resident("VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
    rounded = round_layer(layer, batches, method)
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    peak = _resident("VmHWM") - before
    save_file({name: tensor.contiguous() for name, tensor in rounded().items()}, out)
    versions = {name: version(name) for name in [*packages, "torch"]}
    print()
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak, "versions": versions}))


def _read(case: Path) -> tuple[Layer, list[Batch]]:
    """A case: `{expert}.{projection}` float32, `x` float32 [T, H], `experts` int64 [T, K]; copied off the file map."""
    tensors = {name: tensor.clone() for name, tensor in load_file(case).items()}
    batches = zip(tensors["x"].split(BATCH_TOKENS), tensors["experts"].split(BATCH_TOKENS), strict=True)
    numbers = range(sum(name.endswith(".down") for name in tensors))
    return Layer([Expert(*(tensors[f"{e}.{p}"] for p in PROJECTIONS)) for e in numbers]), [
        Batch(x_TH, [(experts_TK == e).any(dim=1).nonzero().flatten() for e in numbers]) for x_TH, experts_TK in batches
    ]


def _linear(w_OI: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(w_OI.shape[1], w_OI.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(w_OI, requires_grad=False)
    return linear


def _resident(key: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))
