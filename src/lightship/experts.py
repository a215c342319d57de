"""The routed experts of one layer as a module: W4AFP8, FP8 blocks or BF16, whole or one tensor-parallel shard.

`W4AFP8Experts` is the numerical reference of the W4AFP8 runtime. It takes the place of transformers' own experts
module (same call: hidden states, chosen experts, their weights) and keeps what the checkpoint stores: packed int4,
bf16 scales, input scales. A CPU has neither int4 nor FP8 matrix units, so the module expands the weights once, on
first use, and rounds the activations through FP8 by hand: the same numbers, at a CPU's speed.

Tensor parallelism narrows as SGLang does: w1 and w3 on their output dimension, w2 on its input dimension, one
all-reduce at the end. Shape suffixes: T tokens, P (token, expert) pairs, H hidden size, I this shard's intermediate
size, E experts.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from lightship.checkpoint import Checkpoint, TensorReader
from lightship.errors import ServingError
from lightship.w4afp8 import (
    GROUP,
    dequantize_fp8_blocks,
    dequantize_int4,
    round_groups_through_fp8,
    round_through_fp8,
    tensor_parallel_degrees,
    token_scales,
)

Activations = Literal["dynamic", "static"]


@dataclass(frozen=True)
class TensorParallel:
    """This process's place among the tensor-parallel ranks; size 1 needs no process group."""

    rank: int = 0
    size: int = 1

    def all_reduce(self, tensor: torch.Tensor, *, largest: bool = False) -> torch.Tensor:
        """Sum (or maximum) of `tensor` over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
        return tensor

    def shard(self, intermediate: int) -> slice:
        """This rank's part of the intermediate dimension.

        Raises:
            ServingError: the parts would not be whole groups of 128, on which int4 and FP8 scales are laid out.
        """
        if self.size < 1 or intermediate % self.size or (intermediate // self.size) % GROUP:
            degrees = tensor_parallel_degrees(intermediate)
            raise ServingError(
                f"moe_intermediate_size {intermediate} cannot be served at TP {self.size}: each shard must be a "
                f"multiple of {GROUP}, the quantization group; possible degrees: {', '.join(map(str, degrees))}"
            )
        part = intermediate // self.size
        return slice(self.rank * part, (self.rank + 1) * part)


class RoutedExperts(nn.Module):
    """What all formats share: routing, the gated MLP of each reached expert, the weighted sum, the all-reduce.

    A format says how it rounds activations and gives its weights expanded, w13_E2IH [E, 2I, H] (gate above up) and
    w2_EHI [E, H, I].
    """

    def __init__(self, tp: TensorParallel, dtype: torch.dtype) -> None:
        super().__init__()
        self.tp = tp
        self.dtype = dtype
        self._expanded: tuple[torch.Tensor, torch.Tensor] | None = None

    def expand(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights in `dtype`: (w13_E2IH, w2_EHI)."""
        raise NotImplementedError

    def round_input(self, x_TH: torch.Tensor) -> torch.Tensor:
        """The activations that w1 and w3 see."""
        raise NotImplementedError

    def round_intermediate(self, h_PI: torch.Tensor) -> torch.Tensor:
        """The activations that w2 sees."""
        raise NotImplementedError

    def forward(self, x_TH: torch.Tensor, experts_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """Hidden states [T, H], chosen experts [T, K] and their weights [T, K] -> [T, H] in x's dtype."""
        if not len(x_TH):
            return torch.zeros_like(x_TH)
        if self._expanded is None:
            self._expanded = self.expand()
        w13_E2IH, w2_EHI = self._expanded
        order_P = experts_TK.flatten().argsort(stable=True)
        token_P = order_P // experts_TK.shape[1]
        counts = experts_TK.flatten().bincount(minlength=len(w13_E2IH)).tolist()
        rounded_PH = self.round_input(x_TH.to(self.dtype))[token_P]
        h_PI = torch.cat(
            [
                gated(rounded_tH @ w13_E2IH[expert].T)
                for expert, rounded_tH in enumerate(rounded_PH.split(counts))
                if len(rounded_tH)
            ]
        )
        h_PI = self.round_intermediate(h_PI)
        y_PH = torch.cat([h_tI @ w2_EHI[e].T for e, h_tI in enumerate(h_PI.split(counts)) if len(h_tI)])
        y_PH *= weights_TK.flatten()[order_P, None].to(self.dtype)
        y_TH = torch.zeros(x_TH.shape, dtype=self.dtype, device=x_TH.device).index_add_(0, token_P, y_PH)
        return self.tp.all_reduce(y_TH).to(x_TH.dtype)


class W4AFP8Experts(RoutedExperts):
    """Experts as lightship writes them: packed int4, group-128 bf16 scales, FP8 activations.

    Buffers (I is this rank's shard): w13 int8 [E, 2I, H/2], w13_scale bf16 [E, 2I, H/128], w2 int8 [E, H, I/2],
    w2_scale bf16 [E, H, I/128], w13_input_scale and w2_input_scale, the layer's maxima over the experts, as SGLang
    reduces them.

    Args:
        activations: `dynamic`: one FP8 scale a token, found at run time, over all ranks for the intermediate, so that
            every degree of tensor parallelism gives the same numbers; `static`: the checkpoint's, as stock SGLang.
    """

    w13: torch.Tensor
    w13_scale: torch.Tensor
    w2: torch.Tensor
    w2_scale: torch.Tensor
    w13_input_scale: torch.Tensor
    w2_input_scale: torch.Tensor

    def __init__(
        self, tensors: dict[str, torch.Tensor], tp: TensorParallel, dtype: torch.dtype, activations: Activations
    ) -> None:
        super().__init__(tp, dtype)
        self.activations = activations
        for name in ("w13", "w13_scale", "w2", "w2_scale", "w13_input_scale", "w2_input_scale"):
            self.register_buffer(name, tensors[name])

    @classmethod
    def load(
        cls,
        reader: TensorReader,
        layer_name: str,
        tp: TensorParallel,
        dtype: torch.dtype = torch.float32,
        activations: Activations = "dynamic",
    ) -> "W4AFP8Experts":
        """Read this rank's shard of a layer (`model.layers.3.mlp`) from a W4AFP8 checkpoint.

        Raises:
            ServingError: the shard would not be whole groups of 128.
            CheckpointError: a tensor is missing or not finite.
        """
        shard = tp.shard(reader.checkpoint.dimensions.moe_intermediate_size)
        packed, groups = slice(shard.start // 2, shard.stop // 2), slice(shard.start // GROUP, shard.stop // GROUP)
        w13, w2 = _read_experts(reader, layer_name, "weight", shard, packed)
        w13_scale, w2_scale = _read_experts(reader, layer_name, "weight_scale_inv", shard, groups)

        def largest(*inputs: str) -> torch.Tensor:
            names = (f"{n}.{w}.input_scale" for n in _expert_names(reader, layer_name) for w in inputs)
            return torch.stack([reader.read_finite(name).float() for name in names]).max()

        return cls(
            {
                "w13": w13,
                "w13_scale": w13_scale.bfloat16(),
                "w2": w2,
                "w2_scale": w2_scale.bfloat16(),
                "w13_input_scale": largest("w1", "w3"),
                "w2_input_scale": largest("w2"),
            },
            tp,
            dtype,
            activations,
        )

    def expand(self) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            dequantize_int4(self.w13, self.w13_scale, self.dtype),
            dequantize_int4(self.w2, self.w2_scale, self.dtype),
        )

    def round_input(self, x_TH: torch.Tensor) -> torch.Tensor:
        if self.activations == "static":
            return round_through_fp8(x_TH, self.w13_input_scale.to(self.dtype))
        return round_through_fp8(x_TH, token_scales(x_TH.abs().amax(dim=-1, keepdim=True)))

    def round_intermediate(self, h_PI: torch.Tensor) -> torch.Tensor:
        if self.activations == "static":
            return round_through_fp8(h_PI, self.w2_input_scale.to(self.dtype))
        amax_P1 = self.tp.all_reduce(h_PI.abs().amax(dim=-1, keepdim=True), largest=True)
        return round_through_fp8(h_PI, token_scales(amax_P1))


class FP8Experts(RoutedExperts):
    """Experts as the source releases them: FP8 128x128 blocks, activations rounded by token and 128 inputs.

    Buffers (I is this rank's shard): w13 e4m3 [E, 2I, H], w13_scale fp32 [E, 2I/128, H/128], w2 e4m3 [E, H, I],
    w2_scale fp32 [E, H/128, I/128].
    """

    w13: torch.Tensor
    w13_scale: torch.Tensor
    w2: torch.Tensor
    w2_scale: torch.Tensor

    def __init__(self, tensors: dict[str, torch.Tensor], tp: TensorParallel, dtype: torch.dtype) -> None:
        super().__init__(tp, dtype)
        for name in ("w13", "w13_scale", "w2", "w2_scale"):
            self.register_buffer(name, tensors[name])

    @classmethod
    def load(
        cls, reader: TensorReader, layer_name: str, tp: TensorParallel, dtype: torch.dtype = torch.float32
    ) -> "FP8Experts":
        """Read this rank's shard of a layer from an FP8 block checkpoint; errors as `W4AFP8Experts.load`."""
        shard = tp.shard(reader.checkpoint.dimensions.moe_intermediate_size)
        blocks = slice(shard.start // GROUP, shard.stop // GROUP)
        w13, w2 = _read_experts(reader, layer_name, "weight", shard, shard)
        w13_scale, w2_scale = _read_experts(reader, layer_name, "weight_scale_inv", blocks, blocks)
        return cls({"w13": w13, "w13_scale": w13_scale, "w2": w2, "w2_scale": w2_scale}, tp, dtype)

    def expand(self) -> tuple[torch.Tensor, torch.Tensor]:
        w13 = [dequantize_fp8_blocks(w, s, self.dtype) for w, s in zip(self.w13, self.w13_scale, strict=True)]
        w2 = [dequantize_fp8_blocks(w, s, self.dtype) for w, s in zip(self.w2, self.w2_scale, strict=True)]
        return torch.stack(w13), torch.stack(w2)

    def round_input(self, x_TH: torch.Tensor) -> torch.Tensor:
        return round_groups_through_fp8(x_TH)

    def round_intermediate(self, h_PI: torch.Tensor) -> torch.Tensor:
        return round_groups_through_fp8(h_PI)


class BF16Experts(RoutedExperts):
    """Experts as a BF16 source releases them: nothing is rounded.

    Buffers (I is this rank's shard): w13 bf16 [E, 2I, H], w2 bf16 [E, H, I].
    """

    w13: torch.Tensor
    w2: torch.Tensor

    def __init__(self, tensors: dict[str, torch.Tensor], tp: TensorParallel, dtype: torch.dtype) -> None:
        super().__init__(tp, dtype)
        for name in ("w13", "w2"):
            self.register_buffer(name, tensors[name])

    @classmethod
    def load(
        cls, reader: TensorReader, layer_name: str, tp: TensorParallel, dtype: torch.dtype = torch.float32
    ) -> "BF16Experts":
        """Read this rank's shard of a layer from a BF16 checkpoint; errors as `W4AFP8Experts.load`."""
        shard = tp.shard(reader.checkpoint.dimensions.moe_intermediate_size)
        w13, w2 = _read_experts(reader, layer_name, "weight", shard, shard)
        return cls({"w13": w13, "w2": w2}, tp, dtype)

    def expand(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.w13.to(self.dtype), self.w2.to(self.dtype)

    def round_input(self, x_TH: torch.Tensor) -> torch.Tensor:
        return x_TH

    def round_intermediate(self, h_PI: torch.Tensor) -> torch.Tensor:
        return h_PI


def load_experts(
    checkpoint: Checkpoint,
    reader: TensorReader,
    layer_name: str,
    tp: TensorParallel,
    dtype: torch.dtype,
    activations: Activations,
) -> RoutedExperts:
    """The layer's experts in whichever format the checkpoint stores them: int8 is W4AFP8, F8_E4M3 is FP8 blocks."""
    match checkpoint.info(f"{layer_name}.experts.0.gate_proj.weight").dtype:
        case "I8":
            return W4AFP8Experts.load(reader, layer_name, tp, dtype, activations)
        case "F8_E4M3":
            return FP8Experts.load(reader, layer_name, tp, dtype)
        case _:
            return BF16Experts.load(reader, layer_name, tp, dtype)


def _read_experts(
    reader: TensorReader, layer_name: str, part: str, rows: slice, columns: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """A rank's part of all experts' `weight` or `weight_scale_inv`: gate above up [E, 2 rows, …], down [E, …, columns].

    `rows` of gate and up and `columns` of down are where the rank's intermediate features lie, in the tensors' units.
    """
    w13, w2 = [], []
    for name in _expert_names(reader, layer_name):
        above = [reader.read_finite(f"{name}.{p}.{part}", rows, slice(None)) for p in ("gate_proj", "up_proj")]
        w13.append(torch.cat(above))
        w2.append(reader.read_finite(f"{name}.down_proj.{part}", slice(None), columns))
    return torch.stack(w13), torch.stack(w2)


def _expert_names(reader: TensorReader, layer_name: str) -> list[str]:
    return [f"{layer_name}.experts.{e}" for e in range(reader.checkpoint.dimensions.n_routed_experts)]


def gated(gate_up_t2I: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of [..., 2I], gate first: [..., I]."""
    gate, up = gate_up_t2I.chunk(2, dim=-1)
    return F.silu(gate) * up
