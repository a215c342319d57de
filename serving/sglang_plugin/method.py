"""lightship's method of a W4AFP8 layer: SGLang's own W4AFp8MoEMethod, with checks around the load and other kernels."""

import functools
from typing import Any

import torch

from lightship.errors import ServingError
from lightship.serving.sglang_plugin import activity
from lightship.serving.sglang_plugin.arrivals import Arrivals, check_scales, check_shard
from lightship.serving.sglang_plugin.settings import Settings

LOADED = ("w13_weight", "w13_weight_scale_inv", "w2_weight", "w2_weight_scale_inv", "w13_input_scale", "w2_input_scale")


@functools.cache
def method_class() -> type:
    """The class; made on first use, since its base is SGLang's.

    It stays a W4AFp8MoEMethod, so all that SGLang derives from the type (the shared expert apart, no scaling factor in
    the router's weights) is as it was.
    """
    from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
    from sglang.srt.layers.quantization.w4afp8 import W4AFp8MoEMethod

    class LightshipW4AFp8MoEMethod(W4AFp8MoEMethod):  # type: ignore[misc]
        """SGLang's parameters and loader, watched; then one `FusedExperts` in their place."""

        def __init__(self, quant_config: Any, prefix: str, settings: Settings) -> None:
            super().__init__(quant_config)
            self.prefix = prefix
            self.settings = settings
            self.experts: Any = None

        def create_weights(
            self,
            layer: Any,
            num_experts: int,
            hidden_size: int,
            intermediate_size_per_partition: int,
            params_dtype: torch.dtype,
            **extra_weight_attrs: Any,
        ) -> None:
            """SGLang's parameters, each with a loader that is watched.

            Raises:
                ServingError: the shards are not whole groups.
            """
            check_shard(self.prefix, hidden_size, intermediate_size_per_partition, layer.moe_tp_size)
            first = layer.moe_ep_rank * num_experts
            self.arrivals = Arrivals(
                prefix=self.prefix,
                experts=layer.num_experts,
                own=range(first, first + num_experts),
                hidden=hidden_size,
                intermediate=intermediate_size_per_partition * layer.moe_tp_size,
            )
            extra_weight_attrs["weight_loader"] = self.arrivals.watching(extra_weight_attrs["weight_loader"])
            super().create_weights(
                layer, num_experts, hidden_size, intermediate_size_per_partition, params_dtype, **extra_weight_attrs
            )
            activity.create()

        def process_weights_after_loading(self, layer: Any) -> None:
            """Check that all has come, repack it for the kernels, and free SGLang's parameters.

            Raises:
                CheckpointError: a tensor is missing, or scales are zero or not finite.
            """
            if self.experts is not None:
                return
            static = self.settings.activations == "static"
            self.arrivals.check_complete(static=static)
            check_scales(self.arrivals, layer.w13_weight_scale_inv.data, ("w1", "w3"))
            check_scales(self.arrivals, layer.w2_weight_scale_inv.data, ("w2",))

            from lightship.serving.moe.layer import FusedExperts

            def scalar(*shards: str) -> torch.Tensor:
                value = self.arrivals.input_scale(*shards) if static else 1.0
                return torch.tensor(value, dtype=torch.float32, device=layer.w13_weight.device)

            self.experts = FusedExperts(
                layer.w13_weight.data,
                layer.w13_weight_scale_inv.data.bfloat16(),
                layer.w2_weight.data,
                layer.w2_weight_scale_inv.data.bfloat16(),
                scalar("w1", "w3"),
                scalar("w2"),
                activations=self.settings.activations,
                top_k=layer.top_k or 8,
                total_experts=layer.num_experts,
                scale=self.moe_runner_config.routed_scaling_factor or 1.0,
            )
            _free(layer, self.prefix)
            activity.serve(
                self.settings, self.experts.tuning, first_rank=layer.moe_ep_rank == 0 and layer.moe_tp_rank == 0
            )

        def apply(self, layer: Any, dispatch_output: Any) -> Any:  # noqa: ARG002
            """This rank's part of the output, [T, H] bf16, scaled as SGLang's is; experts -1 are other ranks'."""
            topk_weights_TK, topk_ids_TK, _ = dispatch_output.topk_output
            y_TH = self.experts(dispatch_output.hidden_states, topk_ids_TK.int(), topk_weights_TK.float())
            return StandardCombineInput(hidden_states=y_TH)

    return LightshipW4AFp8MoEMethod


def _free(layer: Any, prefix: str) -> None:
    """Give the memory of SGLang's parameters back; loading into them again is an error, where it would be ignored."""

    def refuse(*_: Any, **__: Any) -> None:
        raise ServingError(
            f"the weights of {prefix} are packed for lightship's kernels and cannot be loaded again: restart the "
            "server, with LIGHTSHIP_MOE=off if it must update its weights"
        )

    for name in LOADED:
        empty = torch.nn.Parameter(getattr(layer, name).data.new_empty(0), requires_grad=False)
        empty.weight_loader = refuse  # type: ignore[attr-defined]
        setattr(layer, name, empty)
