"""One rank's routed experts as one call: `FusedExperts`."""

from dataclasses import dataclass
from typing import Literal

import torch

from lightship.errors import ServingError
from lightship.serving.moe import down, gate_up, routing
from lightship.serving.moe.packing import pack_scales, pack_weights
from lightship.serving.moe.routing import Routed
from lightship.serving.moe.tuning import Plan, Shape, plan_for, table_for
from lightship.w4afp8 import GROUP

Activations = Literal["dynamic", "static"]

MOST_TOKENS = 8192
"""Tokens of a launch; more are worked on in turns, so that what lies between the kernels has a bound."""


@dataclass
class Call:
    """What the three steps of a launch hand on: x to FP8 and the sorted pairs, the intermediate to FP8, the sum.

    T tokens, K experts a token, P = T * K pairs, H hidden size, I intermediate size, G = I / 128. Scales are float32.
    """

    x_TH: torch.Tensor
    experts_TK: torch.Tensor
    weights_TK: torch.Tensor
    out_TH: torch.Tensor
    q_TH: torch.Tensor
    scale_T: torch.Tensor
    h_PI: torch.Tensor
    h_scale_PG: torch.Tensor
    routed: Routed | None = None
    """None: nothing is sorted, each pair is a tile."""


class FusedExperts:
    """A layer's experts on one GPU, tensor-parallel shard or expert-parallel part: hidden states in, their sum out.

    Args:
        w13: int8 [E, 2I, H/2], gate above up, packed as in the checkpoint. Rewritten in place: the caller's tensor is
            of no use to others afterwards.
        w13_scale: bf16 [E, 2I, H/128], of either sign.
        w2: int8 [E, H, I/2]; rewritten in place too, or copied if I/128 is odd.
        w2_scale: bf16 [E, H, I/128].
        w13_input_scale, w2_input_scale: float32, one element: the static activation scales; needed if `activations` is
            `static`.
        activations: `dynamic`: an FP8 scale for each token of x, and for each pair and 128 columns of the intermediate,
            found at run time, so that the numbers do not depend on the sharding; `static`: the checkpoint's.
        top_k, total_experts: experts a token chooses, of how many in the model: they decide which plans fit.
        scale: what the sum is multiplied by, the router's factor; it costs no launch.

    Attributes:
        tuning: where plans come from: the file name of the shipped table that has this shape, or `built in`, the rule.

    Raises:
        ServingError: tensors do not belong together, sizes are not multiples of 128, or static scales are missing.
    """

    def __init__(
        self,
        w13: torch.Tensor,
        w13_scale: torch.Tensor,
        w2: torch.Tensor,
        w2_scale: torch.Tensor,
        w13_input_scale: torch.Tensor | None = None,
        w2_input_scale: torch.Tensor | None = None,
        *,
        activations: Activations = "dynamic",
        top_k: int = 8,
        total_experts: int | None = None,
        scale: float = 1.0,
    ) -> None:
        experts, hidden, intermediate = _sizes(w13, w13_scale, w2, w2_scale)
        self.shape = Shape(hidden, intermediate, experts, top_k, total_experts or experts)
        self.scale = float(scale)
        self.input_scales: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        if activations == "static":
            if w13_input_scale is None or w2_input_scale is None:
                raise ServingError(
                    "static activations need w13_input_scale and w2_input_scale; give both, or take dynamic"
                )
            self.input_scales = (w13_input_scale.float().reshape(1), w2_input_scale.float().reshape(1))
        self.w13, self.w13_scale = pack_weights(w13), pack_scales(w13_scale)
        self.w2, self.w2_scale = pack_weights(w2), pack_scales(w2_scale)
        self.device_name = torch.cuda.get_device_name(w13.device) if w13.is_cuda else "cpu"
        self.tuning = table_for(self.device_name, self.shape) or "built in"

    def __call__(
        self,
        x_TH: torch.Tensor,
        experts_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        out: torch.Tensor | None = None,
        plan: Plan | None = None,
    ) -> torch.Tensor:
        """The weighted sum of each token's experts that are this rank's.

        Args:
            x_TH: bf16 [T, H], rows contiguous.
            experts_TK: int32 or int64 [T, K]; -1, or any other number outside 0 to E - 1, is an expert of another rank.
            weights_TK: float32 [T, K].
            out: bf16 [T, H] to write to, rows contiguous; must not overlap x.
            plan: how to run; by default as `tuning.plan_for` says.

        Returns:
            bf16 [T, H].
        """
        out = torch.empty_like(x_TH, memory_format=torch.contiguous_format) if out is None else out
        experts_TK, weights_TK = experts_TK.contiguous(), weights_TK.contiguous()
        tokens = len(x_TH)
        for start in range(0, tokens, MOST_TOKENS):
            part = slice(start, start + MOST_TOKENS)
            how = plan or plan_for(self.device_name, self.shape, min(MOST_TOKENS, tokens - start))
            call = self.begin(x_TH[part], experts_TK[part], weights_TK[part], out[part])
            call.routed = self.route(call, how)
            self.gate_up(call, how)
            self.down(call, how)
        return out

    def begin(
        self, x_TH: torch.Tensor, experts_TK: torch.Tensor, weights_TK: torch.Tensor, out_TH: torch.Tensor
    ) -> Call:
        """A launch's tensors, as `__call__` has them, and those between its steps, not filled yet."""
        (tokens, hidden), pairs, inter = x_TH.shape, experts_TK.numel(), self.shape.intermediate
        new = x_TH.new_empty
        return Call(
            x_TH,
            experts_TK,
            weights_TK,
            out_TH,
            q_TH=new(tokens, hidden, dtype=torch.float8_e4m3fn),
            scale_T=new(tokens, dtype=torch.float32),
            h_PI=new(pairs, inter, dtype=torch.float8_e4m3fn),
            h_scale_PG=new(pairs, inter // GROUP, dtype=torch.float32),
        )

    def route(self, call: Call, plan: Plan) -> Routed | None:
        """The first step: x to FP8, and the pairs by expert unless the plan is direct."""
        given = call.x_TH, self.input_scales[0], call.scale_T, call.q_TH
        if plan.direct:
            routing.quantize(*given)
            return None
        return routing.quantize_and_sort(*given, call.experts_TK, self.shape.experts, plan)

    def gate_up(self, call: Call, plan: Plan) -> None:
        """The first product."""
        gate_up.gate_up(
            call.q_TH, call.scale_T, self.w13, self.w13_scale, call.experts_TK, call.routed, plan.gate_up,
            self.input_scales[1], call.h_PI, call.h_scale_PG,
        )  # fmt: skip

    def down(self, call: Call, plan: Plan) -> None:
        """The second product and the sum."""
        given = call.h_PI, call.h_scale_PG, self.w2, self.w2_scale
        if call.routed is None:
            down.down_and_combine(*given, call.experts_TK, call.weights_TK, plan.down, self.scale, call.out_TH)
        else:
            y_PH = down.down(*given, call.weights_TK, call.routed, plan.down, self.scale)
            down.combine(y_PH, call.experts_TK, self.shape.experts, call.out_TH)


def _sizes(
    w13: torch.Tensor, w13_scale: torch.Tensor, w2: torch.Tensor, w2_scale: torch.Tensor
) -> tuple[int, int, int]:
    """(E, H, I) of tensors that belong together."""
    experts, hidden, intermediate = w13.shape[0], w13.shape[2] * 2, w13.shape[1] // 2
    if hidden % GROUP or intermediate % GROUP or not hidden or not intermediate:
        raise ServingError(
            f"hidden size {hidden} and this shard's intermediate size {intermediate} must be multiples of {GROUP}, the "
            "quantization group; choose a tensor-parallel degree that divides the intermediate size so"
        )
    wanted = {
        "w13": (w13, torch.int8, (experts, 2 * intermediate, hidden // 2)),
        "w13_scale": (w13_scale, torch.bfloat16, (experts, 2 * intermediate, hidden // GROUP)),
        "w2": (w2, torch.int8, (experts, hidden, intermediate // 2)),
        "w2_scale": (w2_scale, torch.bfloat16, (experts, hidden, intermediate // GROUP)),
    }
    for name, (tensor, dtype, shape) in wanted.items():
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise ServingError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}; beside w13 {list(w13.shape)} it must be {dtype} "
                f"{list(shape)}"
            )
    return experts, hidden, intermediate
