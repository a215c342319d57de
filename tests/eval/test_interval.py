"""The interval of a paired loss keeps its promise, and verdicts by it are wrong no more often than stated."""

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightship.eval.interval import ONE_QUESTION, Z_95, loss_interval, questions_needed, score


def test_no_discordant_pair_still_leaves_an_interval() -> None:
    low, high = loss_interval(0, 0, 100)
    assert high == pytest.approx(1.96**2 / (100 + 1.96**2), rel=1e-3)
    assert low == pytest.approx(-high)


def test_the_interval_inverts_the_score_test_with_restricted_maximum_likelihood() -> None:
    """Independently of the closed form: at the bound, the score with the best-fitting restricted model is 1.96."""
    from scipy.optimize import minimize_scalar

    lost, gained, n = 12, 2, 100
    for bound in loss_interval(lost, gained, n):

        def negative_likelihood(p_gained: float, difference: float = bound) -> float:
            p_lost = p_gained + difference
            rest = 1 - p_lost - p_gained
            return -(lost * math.log(p_lost) + gained * math.log(p_gained) + (n - lost - gained) * math.log(rest))

        fit = minimize_scalar(negative_likelihood, bounds=(1e-9, (1 - bound) / 2 - 1e-9), method="bounded")
        score = (lost - gained - n * bound) / math.sqrt(n * (2 * fit.x + bound - bound**2))
        assert abs(score) == pytest.approx(1.96, abs=2e-3)


@pytest.mark.parametrize(("p_lost", "p_gained"), [(0.0, 0.0), (0.005, 0.005), (0.02, 0.005), (0.05, 0.03)])
@pytest.mark.parametrize("n", [70, 400])
def test_the_interval_covers_the_true_loss_as_often_as_it_says(p_lost: float, p_gained: float, n: int) -> None:
    rng = random.Random(5)
    trials, covered = 1500, 0
    seen: dict[tuple[int, int], tuple[float, float]] = {}
    for _ in range(trials):
        draws = [rng.random() for _ in range(n)]
        lost = sum(u < p_lost for u in draws)
        gained = sum(p_lost <= u < p_lost + p_gained for u in draws)
        if (lost, gained) not in seen:
            seen[lost, gained] = loss_interval(lost, gained, n)
        low, high = seen[lost, gained]
        covered += low <= p_lost - p_gained <= high
    assert covered / trials > 0.935


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 500))
def test_the_interval_holds_the_loss_and_mirrors_when_the_models_change_places(
    lost: int, gained: int, same: int
) -> None:
    n = lost + gained + same
    if n == 0:
        return
    low, high = loss_interval(lost, gained, n)
    assert -1 <= low <= (lost - gained) / n <= high <= 1
    assert loss_interval(gained, lost, n) == pytest.approx((-high, -low), abs=1e-9)


def test_more_of_the_same_evidence_narrows_the_interval() -> None:
    widths = [high - low for low, high in (loss_interval(3 * k, k, 100 * k) for k in (1, 2, 4, 8))]
    assert widths == sorted(widths, reverse=True)


def test_the_number_of_questions_needed_is_the_first_that_settles_it() -> None:
    needed = questions_needed(1, 0, 100, 0.02)
    assert needed is not None

    def high(n: int) -> float:
        return loss_interval(0.01 * n, 0, n, correction=ONE_QUESTION)[1]

    assert high(needed) <= 0.02 < high(needed - 1)


def test_a_loss_at_the_limit_cannot_be_settled() -> None:
    assert questions_needed(1, 0, 100, 0.01) is None


def test_the_correction_moves_both_ends_out_and_matters_less_with_more_questions() -> None:
    (low, high), (lower, higher) = loss_interval(3, 1, 100), loss_interval(3, 1, 100, correction=ONE_QUESTION)
    assert lower < low < high < higher
    widened = [
        loss_interval(3 * k, k, 100 * k, correction=ONE_QUESTION)[1] - loss_interval(3 * k, k, 100 * k)[1]
        for k in (1, 10, 100)
    ]
    assert widened == sorted(widened, reverse=True)
    assert widened[-1] < 2e-4


@pytest.mark.parametrize("limit", [0.005, 0.01, 0.02, 0.05])
@pytest.mark.parametrize("n", [50, 200, 400, 1500, 3000])
def test_both_errors_at_the_limit_stay_below_their_level_by_exact_computation(n: int, limit: float) -> None:
    for p_gained in (1e-9, 0.001, 0.003, 0.01, 0.03, 0.1):
        false_pass, false_fail = error_rates(n, limit, p_gained, ONE_QUESTION)
        assert false_pass <= 0.025
        assert false_fail <= 0.025


def test_without_the_correction_the_score_interval_fails_twice_too_often() -> None:
    assert error_rates(400, 0.01, 0.001, 0.0)[1] > 0.05


def error_rates(n: int, limit: float, p_gained: float, correction: float) -> tuple[float, float]:
    """The probabilities of `pass` and of `fail` where the loss is exactly the limit."""
    from scipy.stats import multinomial

    p_lost = p_gained + limit
    most_lost, most_gained = (int(n * p + 9 * math.sqrt(n * p) + 12) for p in (p_lost, p_gained))
    lost, gained = np.meshgrid(np.arange(min(n, most_lost)), np.arange(min(n, most_gained)), indexing="ij")
    possible = lost + gained <= n
    lost, gained = lost[possible], gained[possible]
    counts = np.stack([lost, gained, n - lost - gained], axis=-1)
    mass = multinomial.pmf(counts, n, [p_lost, p_gained, 1 - p_lost - p_gained])
    statistic = score(limit, lost, gained, n, correction)
    return float(mass[statistic <= -Z_95].sum()), float(mass[statistic >= Z_95].sum())
