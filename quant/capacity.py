"""What a planned result asks of machines: how it fits on GPUs, what making it takes in memory.

All from headers and the family's declaration; nothing is measured here.
"""

import math

from lightship.census import SCALE, Census
from lightship.checkpoint import Checkpoint
from lightship.quant.blocks import BATCH_TOKENS
from lightship.quant.pipeline import READERS
from lightship.quant.stash import TENSORS
from lightship.recipe import Quantization
from lightship.records import Fit, Need, Plan

SERVED_AT = 8
"""The degree at which the fit is computed: one node."""
MIB = 1 << 20
GPUS = {"80 GB (H100)": 81559 * MIB, "96 GB (H20)": 97871 * MIB, "141 GB (H200)": 143771 * MIB}
"""Memory as nvidia-smi reports it."""
RUNTIME = 0.1
"""The fraction of a GPU that server, CUDA graphs and activations keep."""
CACHE_BYTES = 2
"""Of one cached number, in bf16."""
PREFETCHED = READERS + 1
"""Experts that are read ahead of the rounding, and the one that it has."""
INTERPRETER = 2_000_000_000
"""Python, torch, transformers and a CUDA context on the host."""


def weight_bytes_at(plan: Plan, taken: Census, tp: int) -> int:
    """Bytes of the result on the fullest of `tp` GPUs."""
    total = 0
    for tensor in plan.tensors:
        weight = taken.expected.get(tensor.name.removesuffix(SCALE))
        if weight and weight.split is not None:
            total += math.ceil(tensor.bytes_after * weight.pieces_at(tp) / weight.pieces)
        else:
            total += tensor.bytes_after
    return total


def fits_of(checkpoint: Checkpoint, plan: Plan, taken: Census) -> list[Fit]:
    """The result on eight GPUs of each size."""
    weights = weight_bytes_at(plan, taken, SERVED_AT)
    cached = checkpoint.architecture.attention.cached_values(checkpoint.config, SERVED_AT)
    per_token = cached * CACHE_BYTES * checkpoint.dimensions.num_hidden_layers
    return [
        Fit(
            gpu=gpu,
            tp=SERVED_AT,
            usable_bytes=int(memory * (1 - RUNTIME)),
            weight_bytes=weights,
            cache_bytes_per_token=per_token,
        )
        for gpu, memory in GPUS.items()
    ]


def peak_memory(
    checkpoint: Checkpoint, taken: Census, settings: Quantization, tokens: int, *, on_gpu: bool
) -> tuple[Need, Need, int]:
    """What the streaming quantizer holds at its peak: (device, host, stash), in bytes; `available` is left at 0.

    On a CPU the device's share lies in host memory too, and is counted there. The stash lies in host memory or on
    disk, as `quantize` decides by what is free; its bytes are given apart.
    """
    sizes = checkpoint.dimensions
    hidden, intermediate = sizes.hidden_size, sizes.moe_intermediate_size
    number_bytes = 2 if on_gpu else 4
    block = max(_beside_experts(taken).values(), default=0) * number_bytes
    batch = min(BATCH_TOKENS, tokens) * (4 * hidden * number_bytes)
    expert = 3 * hidden * intermediate
    # float32 weights, their rounding's copy, and the restored weights that the replay multiplies with
    rounding = 3 * 4 * expert
    gptq = any(s.method == "gptq" for s in (settings, *settings.rules))
    side = max(hidden, intermediate)
    hessians = 2 * 8 * side**2 if gptq else 0
    routed = 4 * tokens * hidden
    device = max(block + batch, rounding + hessians)
    stored = sum(checkpoint.info(name).nbytes for name in _one_expert(checkpoint))
    host = INTERPRETER + PREFETCHED * stored + routed + tokens * sizes.num_experts_per_tok * 12
    stash = TENSORS * tokens * hidden * number_bytes
    device_arithmetic = (
        f"the greater of a block beside its experts ({gb(block)}) with a batch ({gb(batch)}), and an expert in float32 "
        f"x3 ({gb(rounding)}) with 2 float64 Hessians of {side}² ({gb(hessians)})"
    )
    host_arithmetic = (
        f"{gb(INTERPRETER)} for Python and torch, {PREFETCHED} experts read ({gb(PREFETCHED * stored)}), "
        f"the experts' sums of {tokens:,} tokens ({gb(routed)}), routing"
    )
    if not on_gpu:
        host += device
        host_arithmetic += f"; the CPU is the device: {device_arithmetic}"
    return (
        Need(what="GPU memory", needed=device if on_gpu else 0, available=0, arithmetic=device_arithmetic),
        Need(what="memory", needed=host, available=0, arithmetic=host_arithmetic),
        stash,
    )


def active_parameters(checkpoint: Checkpoint, taken: Census) -> int:
    """Weights of linears that one token meets, embeddings and head apart."""
    sizes = checkpoint.dimensions
    share = sizes.num_experts_per_tok / sizes.n_routed_experts
    return round(
        sum(
            math.prod(w.shape) * (share if w.part == "routed experts" else 1)
            for w in taken.expected.values()
            if w.linear or w.part == "router"
        )
    )


def gb(nbytes: float) -> str:
    """Decimal gigabytes, for arithmetic that is shown."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes < 1e10 else f"{nbytes / 1e9:.0f} GB"


def _beside_experts(taken: Census) -> dict[str, int]:
    """Layer -> numbers of its tensors that are not routed experts'; embeddings and heads are loaded by themselves."""
    counts: dict[str, int] = {}
    for weight in taken.expected.values():
        if weight.part == "routed experts":
            continue
        layered = ".layers." in weight.name and weight.part != "embeddings, head"
        unit = weight.name.split(".self_attn.")[0].split(".mlp.")[0] if layered else weight.name
        counts[unit] = counts.get(unit, 0) + math.prod(weight.shape)
    return counts


def _one_expert(checkpoint: Checkpoint) -> list[str]:
    prefix = f"{next(iter(checkpoint.expert_layers()))}.experts.0."
    return [name for name in checkpoint.tensors if name.startswith(prefix)]
