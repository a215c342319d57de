"""A released checkpoint as a running transformers model, straight from its FP8, BF16 or W4AFP8 directory.

transformers builds the architecture; the routed experts become `lightship.experts` modules and every FP8 linear an
`FP8Linear`. Nothing is converted on disk. The same-model measures and the `local` engine run the whole model;
calibration fills one block at a time.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lightship.checkpoint import Checkpoint, TensorReader
from lightship.errors import CheckpointError
from lightship.experts import Activations, RoutedExperts, TensorParallel, load_experts
from lightship.w4afp8 import dequantize_fp8_blocks, round_groups_through_fp8


class FP8Linear(nn.Module):
    """A linear whose weight is stored as FP8 blocks: activations rounded by token and 128 inputs, then a matrix
    product.

    The weight [out, in] is expanded to `dtype` when it is loaded.
    """

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight_OI)
        self.register_buffer("bias", bias_O)

    weight: torch.Tensor
    bias: torch.Tensor | None

    def forward(self, x_TI: torch.Tensor) -> torch.Tensor:
        return F.linear(round_groups_through_fp8(x_TI), self.weight, self.bias)


def load_causal_lm(
    path: Path,
    tp: TensorParallel = TensorParallel(),  # noqa: B008  (frozen, has no state)
    dtype: torch.dtype = torch.float32,
    activations: Activations = "dynamic",
) -> Any:
    """Build the transformers model of a checkpoint directory and load it, this rank's shard of the experts only.

    Args:
        path: an FP8, a BF16 or a W4AFP8 directory.
        tp: this process's tensor-parallel rank; every rank holds everything but the routed experts whole.
        dtype: what the CPU computes in.
        activations: of W4AFP8 experts, see `W4AFP8Experts`.

    Raises:
        CheckpointError: a tensor is missing, has the wrong shape, or is not finite.
        ServingError: the experts cannot be divided by `tp.size`.
    """
    checkpoint = Checkpoint.open(path)
    reader = checkpoint.reader()
    tp.shard(checkpoint.dimensions.moe_intermediate_size)
    model = meta_model(checkpoint, dtype)
    for name, _ in list(model.named_modules()):
        if name.endswith(".mlp.experts"):
            layer_name = name.removesuffix(".experts")
            model.set_submodule(name, load_experts(checkpoint, reader, layer_name, tp, dtype, activations))
    fill(model, "", reader, dtype)
    return model.eval().requires_grad_(False)


def meta_model(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """transformers' model of the checkpoint's architecture, its parameters without memory.

    Raises:
        CheckpointError: transformers cannot build it.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = checkpoint.transformers_config()
    config.num_mtp_layers = 0
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def fill(
    module: nn.Module, name: str, reader: TensorReader, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> None:
    """Read everything that `module`, called `name` in the checkpoint, still lacks: its parameters and buffers.

    FP8 linears become `FP8Linear`s; routed experts, which load themselves, are left alone.

    Raises:
        CheckpointError: a tensor is missing, has the wrong shape, or is not finite.
    """
    stem = f"{name}." if name else ""
    for inner, linear in list(module.named_modules()):
        weight = f"{stem}{inner}.weight"
        if not isinstance(linear, nn.Linear) or reader.checkpoint.info(weight).dtype != "F8_E4M3":
            continue
        q_OI = _read_shaped(reader, weight, linear.weight.shape).to(device)
        w_OI = dequantize_fp8_blocks(q_OI, reader.read_finite(f"{weight}_scale_inv").to(device), dtype)
        bias = linear.bias
        bias_O = None if bias is None else _read_shaped(reader, f"{stem}{inner}.bias", bias.shape).to(device, dtype)
        module.set_submodule(inner, FP8Linear(w_OI, bias_O))
    for inner, part in module.named_modules():
        if isinstance(part, RoutedExperts | FP8Linear):
            continue
        for key, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            if key in part._non_persistent_buffers_set:
                continue
            value = _read_shaped(reader, stem + (f"{inner}.{key}" if inner else key), tensor.shape)
            if isinstance(tensor, nn.Parameter):
                setattr(part, key, nn.Parameter(value.to(device, dtype), requires_grad=False))
            else:
                setattr(part, key, value.to(device, tensor.dtype))


def routed_experts(model: Any) -> dict[str, RoutedExperts]:
    """The model's routed-expert modules by layer name (`model.layers.3.mlp`), in order."""
    return {n.removesuffix(".experts"): m for n, m in model.named_modules() if isinstance(m, RoutedExperts)}


def load_tokenizer(path: Path) -> Any:
    """The checkpoint's own tokenizer.

    Raises:
        CheckpointError: the directory has no usable tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} has no usable tokenizer ({error}); copy the release's tokenizer files"
        ) from error


def _read_shaped(reader: TensorReader, name: str, shape: torch.Size) -> torch.Tensor:
    tensor = reader.read_finite(name)
    if tensor.shape != shape:
        raise CheckpointError(
            f"the tensor {name} has shape {list(tensor.shape)}, config.json asks for {list(shape)}; "
            "weights and configuration are of different models"
        )
    return tensor
