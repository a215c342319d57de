"""Magnitudes are counted exactly, and the scale that follows is the best of its candidates."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightship.quant.magnitudes import (
    BINS,
    OUTLIER_ERROR,
    PERCENTILES,
    Magnitudes,
    choose_input_scale,
    least_bf16_scale,
)
from lightship.w4afp8 import FP8_MAX, round_through_fp8


def counted(*parts: torch.Tensor) -> Magnitudes:
    seen = Magnitudes()
    for part in parts:
        seen.add(part)
    return seen


def normal(seed: int, count: int = 20_000) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(-(2.0**120), 2.0**120, width=32), min_size=1, max_size=30), st.integers(1, 29))
def test_every_element_is_counted_at_its_own_magnitude(values: list[float], split: int) -> None:
    x = torch.tensor(values)
    seen = counted(x[:split], x[split:])
    assert seen.counts.sum() == len(values)
    assert seen.amax == float(x.abs().max())
    expected = torch.zeros(BINS, dtype=torch.int64)
    for value in x.bfloat16():
        expected[int(value.abs().view(torch.int16))] += 1
    assert seen.counts.equal(expected)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_noticed(value: float) -> None:
    assert not counted(normal(0), torch.tensor([1.0, value])).finite
    assert counted(normal(0)).finite


def mixture(seed: int, share: float, size: float) -> torch.Tensor:
    x = normal(seed)
    return torch.where(torch.rand(len(x), generator=torch.Generator().manual_seed(seed)) < share, x * size, x)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.sampled_from([0.0, 1e-4, 1e-3, 1e-2]), st.sampled_from([10.0, 1e3, 1e5, 1e7]))
def test_the_scale_is_the_best_of_the_candidates_by_trying_each(seed: int, share: float, size: float) -> None:
    x = mixture(seed, share, size).bfloat16()
    chosen = choose_input_scale(counted(x))
    exact = x.double()
    ordered = exact.abs().sort().values
    errors = {}
    for percentile in PERCENTILES:
        largest = float(ordered[max(0, math.ceil(len(x) * percentile / 100) - 1)])
        rounded = round_through_fp8(x.float(), least_bf16_scale(largest)).double()
        errors[percentile] = float((exact - rounded).square().sum() / exact.square().sum())
    assert chosen.error == pytest.approx(min(errors.values()), rel=1e-6)
    assert chosen.error_at_amax == pytest.approx(errors[100.0], rel=1e-6)
    assert errors[chosen.percentile] == pytest.approx(chosen.error, rel=1e-6)


@settings(deadline=None, max_examples=60)
@given(st.floats(0, 1e30))
def test_the_scale_is_a_bf16_number_just_large_enough(amax: float) -> None:
    scale = least_bf16_scale(amax)
    assert scale == float(torch.tensor(scale).bfloat16()) > 0
    assert scale * FP8_MAX >= amax
    below = torch.nextafter(torch.tensor(scale).bfloat16(), torch.tensor(0.0).bfloat16())
    assert float(below) * FP8_MAX < max(amax, 1e-12)


def test_a_layer_without_outliers_keeps_its_largest_and_is_not_flagged() -> None:
    chosen = choose_input_scale(counted(normal(0)))
    assert chosen.percentile == 100
    assert chosen.error == chosen.error_at_amax < OUTLIER_ERROR
    assert not chosen.outliers


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("size", [1e5, 1e6, 1e7])
def test_planted_outliers_are_flagged(count: int, size: float) -> None:
    """So large that at their scale FP8 has few numbers left for the others, though these hold none of the energy."""
    x = normal(1)
    x[:count] = size
    assert choose_input_scale(counted(x)).outliers


def test_outliers_within_the_range_of_fp8_are_not_flagged() -> None:
    x = normal(1)
    x[:5] = 100
    assert not choose_input_scale(counted(x)).outliers
