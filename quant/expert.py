"""Round one routed expert on the tokens that were routed to it, and replay it.

w1 and w3 read the same inputs, so they share a Hessian and are rounded as one matrix, gate above up. w2 is rounded
against the intermediates of the rounded w1 and w3, as it will see them. An expert that saw few tokens borrows from the
layer: its Hessians are topped up to the floor with the layer's average token, sent through this very expert. One that
saw none is rounded by the MSE grid.

Shape suffixes: T tokens of the layer, t tokens of this expert, H hidden size, I intermediate size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lightship.experts import gated
from lightship.quant.rounding import Int4Weight, output_error, relative_error, restore, rounding_for, tensor_cores
from lightship.recipe import Quantization, RoundingSettings
from lightship.records import ExpertRounding
from lightship.w4afp8 import pack_int4, round_through_fp8, token_scales

CHUNK = 16384
"""Tokens that are multiplied at once."""
PRIOR_TOKENS = 4096
"""Of the layer, evenly spaced, whose average tops up the Hessian of a starved expert."""

RoundActivations = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class ExpertWeights:
    """One expert's weights: w13_2IH float32 [2I, H], gate above up, and w2_HI float32 [H, I]."""

    w13_2IH: torch.Tensor
    w2_HI: torch.Tensor


@dataclass(frozen=True)
class RoundedExpert:
    """int4 and scales of both matrices."""

    w13: Int4Weight
    w2: Int4Weight

    def weights(self, dtype: torch.dtype) -> ExpertWeights:
        """What the int4 weights stand for."""
        return ExpertWeights(restore(self.w13, dtype), restore(self.w2, dtype))


def round_tokens_through_fp8(x_TI: torch.Tensor) -> torch.Tensor:
    """FP8 with a dynamic scale a token: what the W4AFP8 runtime makes of activations."""
    return round_through_fp8(x_TI, token_scales(x_TI.abs().amax(dim=-1, keepdim=True)))


def intermediate(weights: ExpertWeights, x_tH: torch.Tensor, round_activations: RoundActivations) -> torch.Tensor:
    """silu(gate) * up of the rounded inputs: [t, I]."""
    parts = [gated(round_activations(chunk) @ weights.w13_2IH.T.to(x_tH.dtype)) for chunk in x_tH.split(CHUNK)]
    return torch.cat(parts) if parts else x_tH.new_empty(0, weights.w2_HI.shape[1])


def output(weights: ExpertWeights, h_tI: torch.Tensor, round_activations: RoundActivations) -> torch.Tensor:
    """w2 of the rounded intermediates: [t, H]."""
    parts = [round_activations(chunk) @ weights.w2_HI.T.to(h_tI.dtype) for chunk in h_tI.split(CHUNK)]
    return torch.cat(parts) if parts else h_tI.new_empty(0, weights.w2_HI.shape[0])


class ExpertRounder:
    """Rounds the experts of one layer by the recipe.

    Args:
        settings: the recipe's `quantization`.
        layer: the layer's number, for the rules.
        prior_TH: some of the layer's tokens, evenly spaced, for experts under the floor.
    """

    def __init__(self, settings: Quantization, layer: int, prior_TH: torch.Tensor) -> None:
        self._settings = settings
        by_layer = [rule for rule in settings.rules if rule.layers is not None and layer in rule.layers]
        self._base: RoundingSettings = by_layer[-1] if by_layer else settings
        self._stronger = [rule for rule in settings.rules if rule.output_error_above is not None]
        self._prior_TH = prior_TH
        self._prior_hessian_HH: torch.Tensor | None = None

    @property
    def needs_tokens(self) -> bool:
        """Whether any method in use reads a Hessian."""
        return any(s.method == "gptq" for s in [self._base, *self._stronger])

    def round(
        self, expert: int, weights: ExpertWeights, x_tH: torch.Tensor, router_weights_t: torch.Tensor
    ) -> tuple[RoundedExpert, ExpertRounding]:
        """Round the expert against its tokens x_tH [t, H]; their routing weights count if the recipe says so."""
        tokens, floor = len(x_tH), self._settings.token_floor
        informed = self.needs_tokens and tokens > 0
        topped_up = informed and tokens < floor
        importance_t1 = None
        if self._settings.weight_tokens_by_router and tokens:
            squares_t = router_weights_t.float().square()
            importance_t1 = (squares_t / squares_t.mean().clamp_min(1e-30)).sqrt()[:, None]
        hessian_HH = hessian_II = None
        if informed:
            hessian_HH = _hessian(x_tH, importance_t1)
            if topped_up:
                hessian_HH += (floor - tokens) * self._prior_hessian()
        w13, w13_how, w13_output_error = self._round(weights.w13_2IH, hessian_HH)
        del hessian_HH
        if informed:
            replayed = ExpertWeights(restore(w13, x_tH.dtype), weights.w2_HI)
            hessian_II = _hessian(intermediate(replayed, x_tH, round_tokens_through_fp8), importance_t1)
            if topped_up:
                prior_tI = intermediate(replayed, self._prior_TH, round_tokens_through_fp8)
                hessian_II += (floor - tokens) / len(prior_tI) * _hessian(prior_tI, None)
        w2, w2_how, w2_output_error = self._round(weights.w2_HI, hessian_II)
        if self.needs_tokens and not tokens:
            how = "mse, no tokens"
        else:
            how = w13_how if w13_how == w2_how else f"w13 {w13_how}, w2 {w2_how}"
            how += ", topped up" if topped_up else ""
        return RoundedExpert(w13, w2), ExpertRounding(
            expert=expert,
            tokens=tokens,
            how=how,
            w13_error=relative_error(weights.w13_2IH, w13),
            w2_error=relative_error(weights.w2_HI, w2),
            w13_output_error=w13_output_error,
            w2_output_error=w2_output_error,
        )

    def _round(self, w_OI: torch.Tensor, hessian_II: torch.Tensor | None) -> tuple[Int4Weight, str, float | None]:
        """The rounded weight, the method, and the error of its outputs if there is a Hessian to tell."""
        best = rounding_for(self._base)(w_OI, hessian_II)
        how: str = self._base.method
        if hessian_II is None:
            return best, how, None
        error = output_error(w_OI, best, hessian_II)
        for number, rule in enumerate(self._stronger):
            assert rule.output_error_above is not None
            if error > rule.output_error_above:
                other = rounding_for(rule)(w_OI, hessian_II)
                if (other_error := output_error(w_OI, other, hessian_II)) < error:
                    best, error, how = other, other_error, f"{rule.method} by rule {number + 1}"
        return best, how, error

    def _prior_hessian(self) -> torch.Tensor:
        """The average token's outer product [H, H]."""
        if self._prior_hessian_HH is None:
            self._prior_hessian_HH = _hessian(self._prior_TH, None) / len(self._prior_TH)
        return self._prior_hessian_HH


def packed(rounded: Int4Weight) -> tuple[torch.Tensor, torch.Tensor]:
    """What goes to disk: int8 [out, in / 2] and bf16 [out, in / 128], on the CPU."""
    return pack_int4(rounded.q_OI).cpu(), rounded.scale_OG.cpu()


def _hessian(x_tI: torch.Tensor, importance_t1: torch.Tensor | None) -> torch.Tensor:
    """Sum of x xᵀ over the tokens, float32 [in, in]; each token times its importance.

    On a GPU the inputs are bf16, which fits TF32's mantissa: tensor cores multiply them exactly and add in float32.
    """
    total_II = torch.zeros(x_tI.shape[1], x_tI.shape[1], device=x_tI.device)
    chunks = x_tI.split(CHUNK)
    weights = importance_t1.split(CHUNK) if importance_t1 is not None else [None] * len(chunks)
    for chunk_tI, weight_t1 in zip(chunks, weights, strict=True):
        inputs_tI = (chunk_tI if weight_t1 is None else (chunk_tI * weight_t1).to(chunk_tI.dtype)).float()
        with tensor_cores(chunk_tI.dtype == torch.bfloat16):
            total_II.addmm_(inputs_tI.T, inputs_tI)
    return total_II
