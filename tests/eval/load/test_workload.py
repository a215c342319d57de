"""A plan is decided before it is sent: gaps of a seed, a trace's times, lengths that fit, prefixes that repeat."""

import statistics
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightship.errors import EvaluationError
from lightship.eval.load.prompts import PromptText
from lightship.eval.load.traces import Arrival
from lightship.eval.load.workload import at_concurrency, at_rate, from_trace

TEXT = PromptText([i * i % 997 for i in range(5000)])
TRACE = [
    Arrival(0.0, 1024, 100, (0, 1)),
    Arrival(1.0, 1500, 50, (0, 1, 2)),
    Arrival(1.0, 700, 10, (3, 4)),
    Arrival(2.5, 1500, 3, (0, 1, 2)),
]


def common(a: list[int], b: list[int]) -> int:
    """Tokens that two prompts begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_poisson_gaps_have_the_rate_and_its_spread_and_are_the_same_for_a_seed() -> None:
    plan = at_rate(5.0, TEXT, 4000, 4, 2, seed=7)
    dues = [r.due for r in plan.requests]
    gaps = [b - a for a, b in pairwise(dues)]
    assert statistics.mean(gaps) == pytest.approx(0.2, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(0.2, rel=0.08)
    assert at_rate(5.0, TEXT, 4000, 4, 2, seed=7) == plan
    assert at_rate(5.0, TEXT, 4000, 4, 2, seed=8).requests != plan.requests


def test_another_rate_is_the_same_arrivals_faster() -> None:
    slow, fast = (at_rate(rate, TEXT, 50, 4, 2) for rate in (1.0, 4.0))
    assert [r.due for r in slow.requests] == pytest.approx([4 * r.due for r in fast.requests])


def test_prompts_share_what_the_trace_says_they_share_and_nothing_more() -> None:
    plan = from_trace(TRACE, TEXT, 4096, "clip", "t")
    first, second, third, fourth = (r.prompt for r in plan.requests)
    assert [len(r.prompt) for r in plan.requests] == [1024, 1500, 700, 1500]
    assert common(first, second) == 1024
    assert second == fourth
    assert common(first, third) == 0
    assert plan.about.repeated_tokens == pytest.approx((1024 + 1500) / (1024 + 1500 + 700 + 1500))


def test_scaled_prompts_share_in_proportion() -> None:
    plan = from_trace(TRACE, TEXT, 500, "scale", "t")
    about = plan.about
    assert about.length_factor == pytest.approx(500 / 1550)
    assert (about.prompts_clipped, about.outputs_clipped) == (0, 0)
    assert max(len(r.prompt) + r.output_tokens for r in plan.requests) <= 500
    first, second = plan.requests[0].prompt, plan.requests[1].prompt
    assert len(first) == round(1024 * about.length_factor) == common(first, second)
    assert about.repeated_tokens == pytest.approx((1024 + 1500) / (1024 + 1500 + 700 + 1500), abs=0.01)


def test_clipped_requests_fit_and_are_counted() -> None:
    plan = from_trace([Arrival(0, 5000, 10), Arrival(1, 20, 900), Arrival(2, 5, 5)], TEXT, 100, "clip", "t")
    assert [(len(r.prompt), r.output_tokens) for r in plan.requests] == [(90, 10), (20, 50), (5, 5)]
    assert (plan.about.prompts_clipped, plan.about.outputs_clipped, plan.about.window) == (1, 1, 100)


@given(
    st.lists(st.tuples(st.integers(0, 6000), st.integers(0, 900)), min_size=1, max_size=6),
    st.integers(2, 3000),
    st.sampled_from(["clip", "scale"]),
)
def test_whatever_the_trace_every_request_fits_the_window_and_has_a_token_to_read_and_to_write(
    lengths: list[tuple[int, int]], window: int, fit: str
) -> None:
    trace = [Arrival(0.0, p, o, tuple(range(-(-p // 512) or 1))) for p, o in lengths]
    plan = from_trace(trace, TEXT, window, fit, "t")  # type: ignore[arg-type]
    for request in plan.requests:
        assert len(request.prompt) >= 1
        assert request.output_tokens >= 1
        assert len(request.prompt) + request.output_tokens <= window
    assert plan.about.prompt_tokens.total == sum(len(r.prompt) for r in plan.requests)


def test_prompts_of_a_rate_differ_from_their_first_token_on() -> None:
    prompts = [r.prompt for r in at_rate(1.0, TEXT, 100, 64, 2).requests]
    assert len({p[0] for p in prompts}) == 100


def test_too_few_requests_for_a_concurrency_are_refused() -> None:
    with pytest.raises(EvaluationError, match="3 requests never reach a concurrency of 4"):
        at_concurrency(4, TEXT, 3, 8, 2)


def test_a_cut_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(EvaluationError, match="no request is left"):
        from_trace([], TEXT, 100, "clip", "t")
