"""An expert is rounded for the tokens that it will see: its own, the layer's where these are few, by their weight."""

import pytest
import torch

from lightship.quant.expert import ExpertRounder, ExpertWeights, RoundedExpert
from lightship.quant.rounding import output_error
from lightship.recipe import Quantization, Rule
from lightship.records import ExpertRounding

HIDDEN, INTERMEDIATE, TOKENS = 128, 128, 600


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHTS = ExpertWeights(random(0, 2 * INTERMEDIATE, HIDDEN) * 0.1, random(1, HIDDEN, INTERMEDIATE) * 0.1)
PRIOR_TH = random(2, 300, HIDDEN) * torch.linspace(0.1, 3, HIDDEN)
X_TH = random(3, TOKENS, HIDDEN) @ random(4, HIDDEN, HIDDEN)


def rounded(
    x_TH: torch.Tensor, weights_t: torch.Tensor | None = None, **settings: object
) -> tuple[RoundedExpert, ExpertRounding]:
    weights_t = torch.ones(len(x_TH)) if weights_t is None else weights_t
    return ExpertRounder(Quantization(**settings), 3, PRIOR_TH).round(7, WEIGHTS, x_TH, weights_t)


def error_on(result: RoundedExpert, x_TH: torch.Tensor) -> float:
    return output_error(WEIGHTS.w13_2IH, result.w13, x_TH.T @ x_TH)


def test_few_tokens_are_topped_up_to_the_floor_with_the_average_of_the_layer() -> None:
    few_TH, floor = X_TH[:10], 400
    _, record = rounded(few_TH, method="gptq", token_floor=floor)
    hessian_HH = few_TH.T @ few_TH + (floor - 10) / len(PRIOR_TH) * PRIOR_TH.T @ PRIOR_TH
    result, _ = rounded(few_TH, method="gptq", token_floor=floor)
    assert (record.expert, record.tokens, record.how) == (7, 10, "gptq, topped up")
    assert record.w13_output_error == pytest.approx(output_error(WEIGHTS.w13_2IH, result.w13, hessian_HH), rel=1e-4)


def test_topping_up_lowers_the_error_on_tokens_not_seen() -> None:
    topped, _ = rounded(X_TH[:10], method="gptq", token_floor=400)
    alone, record = rounded(X_TH[:10], method="gptq", token_floor=10)
    assert record.how == "gptq"
    assert error_on(topped, PRIOR_TH) < error_on(alone, PRIOR_TH)


def test_without_tokens_the_grid_rounds_as_if_it_had_been_asked_for() -> None:
    result, record = rounded(X_TH[:0], method="gptq")
    grid, plain = rounded(X_TH[:0], method="mse")
    assert (record.how, plain.how) == ("mse, no tokens", "mse")
    assert record.w13_output_error is record.w2_output_error is None
    assert result.w13.q_OI.equal(grid.w13.q_OI)
    assert result.w2.scale_OG.equal(grid.w2.scale_OG)


def test_router_weights_change_the_rounding_and_lower_the_weighted_error() -> None:
    weights_t = torch.where(torch.arange(TOKENS) < 60, 1.0, 0.02)
    plain, _ = rounded(X_TH, weights_t, method="gptq", token_floor=0)
    weighted, _ = rounded(X_TH, weights_t, method="gptq", token_floor=0, weight_tokens_by_router=True)
    assert not plain.w13.q_OI.equal(weighted.w13.q_OI)
    assert error_on(weighted, X_TH * weights_t[:, None]) < error_on(plain, X_TH * weights_t[:, None])


def test_equal_router_weights_change_nothing() -> None:
    weights_t = torch.full((TOKENS,), 0.25)
    plain, _ = rounded(X_TH, weights_t, method="gptq", token_floor=0)
    weighted, _ = rounded(X_TH, weights_t, method="gptq", token_floor=0, weight_tokens_by_router=True)
    assert plain.w13.q_OI.equal(weighted.w13.q_OI)


def test_a_rule_keeps_the_better_of_two_roundings() -> None:
    above = 1e-9
    better, how = rounded(X_TH, method="mse", rules=[Rule(output_error_above=above, method="gptq")])
    worse, kept = rounded(X_TH, method="gptq", token_floor=0, rules=[Rule(output_error_above=above, method="absmax")])
    gptq, _ = rounded(X_TH, method="gptq", token_floor=0)
    assert how.how == "gptq by rule 1"
    assert kept.how == "gptq"
    assert worse.w13.q_OI.equal(gptq.w13.q_OI)
    assert better.w13.q_OI.equal(gptq.w13.q_OI)


def test_a_rule_below_its_error_is_not_tried() -> None:
    _, record = rounded(X_TH, method="mse", rules=[Rule(output_error_above=0.9, method="gptq")])
    assert record.how == "mse"


def test_a_rule_for_layers_holds_for_these_alone() -> None:
    for layers, how in (([3], "absmax"), ([2, 4], "mse")):
        _, record = rounded(X_TH, method="mse", rules=[Rule(layers=layers, method="absmax")])
        assert record.how == how
