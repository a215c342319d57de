"""Which W4AFP8 layers lightship runs: asked once a layer, when SGLang chooses the layer's method."""

from collections.abc import Callable
from typing import Any

import torch

from lightship.errors import ServingError
from lightship.serving.sglang_plugin import activity
from lightship.serving.sglang_plugin.settings import MOE, Settings

HOPPER = (9, 0)
UNUSUAL = {"gemm1_alpha": None, "gemm1_clamp_limit": None, "swiglu_limit": None, "activation": "silu", "is_gated": True}
"""Parts of a layer's configuration that change the experts' function, with the values that leave it silu(gate) * up."""


def choose_method(settings: Settings, original: Callable[..., Any], config: Any, layer: Any, prefix: str) -> Any:
    """Around `W4AFp8Config.get_quant_method`: SGLang's choice, or lightship's method in place of W4AFp8MoEMethod.

    Raises:
        ServingError: LIGHTSHIP_MOE=on, and the layer cannot be taken.
    """
    from sglang.srt.layers.quantization.w4afp8 import W4AFp8MoEMethod

    chosen = original(config, layer, prefix)
    if type(chosen) is not W4AFp8MoEMethod:
        return chosen
    if reason := why_not(layer):
        if settings.mode == "on":
            raise ServingError(f"{MOE}=on, but lightship cannot run {prefix}: {reason}; {MOE}=auto would leave it")
        activity.leave(reason)
        return chosen
    from lightship.serving.sglang_plugin.method import method_class

    return method_class()(config, prefix, settings)


def why_not(layer: Any) -> str | None:
    """Why lightship cannot run this FusedMoE layer here; None if it can."""
    from sglang.srt.layers.moe.utils import get_moe_a2a_backend
    from sglang.srt.runtime_context import get_exec

    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != HOPPER:
        return f"the kernels need a Hopper GPU (compute capability 9.0), this is {_device()}"
    if layer.params_dtype != torch.bfloat16:
        return f"the kernels take bfloat16 activations, the model has {layer.params_dtype}"
    if not get_moe_a2a_backend().is_none():
        return f"--moe-a2a-backend {get_moe_a2a_backend().value} gives the experts tokens in a layout of its own"
    for name in ("enable_eplb", "ep_num_redundant_experts", "enable_paged_experts"):
        if getattr(get_exec().moe, name, None):
            return f"{name} moves experts after they are loaded"
    if layer.num_fused_shared_experts:
        return "the shared expert is fused into the routed ones, and is not int4"
    config = layer.moe_runner_config
    for name, usual in UNUSUAL.items():
        if getattr(config, name, usual) != usual:
            return f"the experts' {name} is {getattr(config, name)}"
    if config.apply_router_weight_on_input or config.no_combine:
        return "the router's weights are not applied to the experts' outputs"
    return None


def _device() -> str:
    if not torch.cuda.is_available():
        return "a machine without one"
    return f"{torch.cuda.get_device_name()} ({'.'.join(map(str, torch.cuda.get_device_capability()))})"
