"""The fused layer's reference, in float32, and inputs for it, for the interpreter's tests, the GPU's, the benchmark."""

from typing import TYPE_CHECKING

import torch

from lightship.w4afp8 import GROUP, dequantize_int4, round_groups_through_fp8, round_through_fp8, token_scales

if TYPE_CHECKING:
    from lightship.serving.moe.layer import FusedExperts

Tensors = dict[str, torch.Tensor]


def fused(weights: Tensors, **settings: object) -> "FusedExperts":
    """A layer made of copies."""
    # Here, as it needs triton: tests look first whether that is there, and set its interpreter up.
    from lightship.serving.moe.layer import FusedExperts

    return FusedExperts(**{name: tensor.clone() for name, tensor in weights.items()}, **settings)


def random_weights(experts: int, hidden: int, intermediate: int, device: str = "cpu", seed: int = 0) -> Tensors:
    """A layer as the checkpoint has it: every int4 value, scales of both signs."""
    generator = torch.Generator(device).manual_seed(seed)

    def packed(*shape: int) -> torch.Tensor:
        return torch.randint(-128, 128, shape, dtype=torch.int8, device=device, generator=generator)

    def scales(outputs: int, inputs: int) -> torch.Tensor:
        shape = (experts, outputs, inputs // GROUP)
        size = torch.rand(shape, device=device, generator=generator) + 0.5
        sign = torch.randint(0, 2, shape, device=device, generator=generator) * 2 - 1
        return (size * sign * inputs**-0.5 / 4.6).bfloat16()

    return {
        "w13": packed(experts, 2 * intermediate, hidden // 2),
        "w13_scale": scales(2 * intermediate, hidden),
        "w2": packed(experts, hidden, intermediate // 2),
        "w2_scale": scales(hidden, intermediate),
    }


def random_routing(
    tokens: int, experts: int, top_k: int, device: str = "cpu", seed: int = 0, dtype: torch.dtype = torch.int32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct experts and weights that add up to 1: [tokens, top_k] each."""
    generator = torch.Generator(device).manual_seed(seed)
    score = torch.rand(tokens, experts, device=device, generator=generator)
    value, chosen = score.topk(top_k, dim=-1)
    return chosen.to(dtype), (value / value.sum(dim=-1, keepdim=True)).float()


def random_tokens(tokens: int, hidden: int, device: str = "cpu", seed: int = 0) -> torch.Tensor:
    """bf16 [tokens, hidden], of quite different sizes."""
    generator = torch.Generator(device).manual_seed(seed)
    size = 10 ** (2 * torch.rand(tokens, 1, device=device, generator=generator) - 1)
    return (torch.randn(tokens, hidden, device=device, generator=generator) * size).bfloat16()


def reference(
    weights: Tensors,
    x_TH: torch.Tensor,
    experts_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    rounding: str,
    input_scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """float32 [T, H]. rounding: `none`, or activations through FP8 as the kernels do it, `dynamic` or `static`."""
    x_TH = x_TH.float()
    if rounding == "dynamic":
        x_TH = round_through_fp8(x_TH, token_scales(x_TH.abs().amax(dim=-1, keepdim=True)))
    elif rounding == "static":
        x_TH = round_through_fp8(x_TH, input_scales[0])
    out_TH = torch.zeros_like(x_TH)
    for expert in experts_TK.unique().tolist():
        if not 0 <= expert < len(weights["w13"]):
            continue
        token, slot = (experts_TK == expert).nonzero(as_tuple=True)
        w13, w2 = (dequantize_int4(weights[w][expert], weights[f"{w}_scale"][expert]) for w in ("w13", "w2"))
        gate, up = (x_TH[token] @ w13.T).chunk(2, dim=-1)
        h = torch.nn.functional.silu(gate) * up
        if rounding == "dynamic":
            h = round_groups_through_fp8(h)
        elif rounding == "static":
            h = round_through_fp8(h, input_scales[1])
        out_TH.index_add_(0, token, (h @ w2.T) * weights_TK[token, slot, None])
    return out_TH


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Norm of the difference over the norm of `want`."""
    return float((got.float() - want.float()).norm() / want.float().norm().clamp_min(1e-30))
