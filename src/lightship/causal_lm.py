"""A released checkpoint as a running transformers model, straight from its FP8 or W4AFP8 directory.

transformers builds the architecture; the routed experts become `lightship.experts` modules and every FP8 linear an
`FP8Linear`. Nothing is converted on disk. Calibration, the same-model measures and the `local` engine all run this
model.
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

    def __init__(self, weight_OI: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight_OI)

    weight: torch.Tensor

    def forward(self, x_TI: torch.Tensor) -> torch.Tensor:
        return F.linear(round_groups_through_fp8(x_TI), self.weight)


def load_causal_lm(
    path: Path,
    tp: TensorParallel = TensorParallel(),  # noqa: B008  (frozen, has no state)
    dtype: torch.dtype = torch.float32,
    activations: Activations = "dynamic",
) -> Any:
    """Build the transformers model of a checkpoint directory and load it, this rank's shard of the experts only.

    Args:
        path: an FP8 or a W4AFP8 directory.
        tp: this process's tensor-parallel rank; every rank holds everything but the routed experts whole.
        dtype: what the CPU computes in.
        activations: of W4AFP8 experts, see `W4AFP8Experts`.

    Raises:
        CheckpointError: a tensor is missing, has the wrong shape, or is not finite.
        ServingError: the experts cannot be divided by `tp.size`.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    checkpoint = Checkpoint.open(path)
    reader = checkpoint.reader()
    tp.shard(checkpoint.dimensions.moe_intermediate_size)
    config = checkpoint.transformers_config()
    config.num_mtp_layers = 0
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, module in list(model.named_modules()):
        if name.endswith(".mlp.experts"):
            layer_name = name.removesuffix(".experts")
            model.set_submodule(name, load_experts(checkpoint, reader, layer_name, tp, dtype, activations))
        elif isinstance(module, nn.Linear) and checkpoint.info(f"{name}.weight").dtype == "F8_E4M3":
            q_OI = _read_shaped(reader, f"{name}.weight", module.weight.shape)
            scale_inv = reader.read_finite(f"{name}.weight_scale_inv")
            model.set_submodule(name, FP8Linear(dequantize_fp8_blocks(q_OI, scale_inv, dtype)))
    _load_unquantized(model, reader, dtype)
    return model.eval().requires_grad_(False)


def check_architecture(checkpoint: Checkpoint) -> None:
    """Refuse a model that transformers cannot build.

    Raises:
        CheckpointError: names the model type, and what its declaration would need.
    """
    checkpoint.transformers_config()


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


def _load_unquantized(model: Any, reader: TensorReader, dtype: torch.dtype) -> None:
    """Norms, embeddings, head, router: everything that still waits on the meta device, and persistent buffers."""
    for name, module in model.named_modules():
        if isinstance(module, RoutedExperts | FP8Linear):
            continue
        transient = module._non_persistent_buffers_set
        for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if key in transient:
                continue
            value = _read_shaped(reader, f"{name}.{key}" if name else key, tensor.shape)
            if isinstance(tensor, nn.Parameter):
                setattr(module, key, nn.Parameter(value.to(dtype), requires_grad=False))
            else:
                setattr(module, key, value.to(tensor.dtype))


def _read_shaped(reader: TensorReader, name: str, shape: torch.Size) -> torch.Tensor:
    tensor = reader.read_finite(name)
    if tensor.shape != shape:
        raise CheckpointError(
            f"the tensor {name} has shape {list(tensor.shape)}, config.json asks for {list(shape)}; "
            "weights and configuration are of different models"
        )
    return tensor
