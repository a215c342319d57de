"""Pairs of answers give a loss, an interval that keeps its promise, and an honest p-value."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightship.errors import EvaluationError
from lightship.eval.comparison import compare, loss_interval, mcnemar_p_value, questions_needed
from tests.eval.release import accuracy


def test_lost_and_gained_questions_are_named() -> None:
    c = compare(accuracy([True, True, False, True]), accuracy([True, False, True, False]))
    assert (c.lost, c.gained, c.loss) == (["1", "3"], ["2"], 0.25)
    assert (c.source_accuracy, c.quantized_accuracy, c.questions) == (0.75, 0.5, 4)
    assert c.loss_low < c.loss < c.loss_high


def test_different_questions_are_refused() -> None:
    with pytest.raises(EvaluationError, match="1 questions were answered by one model only, the first is '2'"):
        compare(accuracy([True, True, True]), accuracy([True, True]))


def test_different_settings_are_refused() -> None:
    with pytest.raises(EvaluationError, match="same settings"):
        compare(accuracy([True]), accuracy([True], overrides={"max_gen_toks": "64"}))


def test_mcnemar_is_the_exact_binomial_test() -> None:
    from scipy.stats import binomtest

    for lost, gained in [(0, 0), (1, 0), (9, 1), (5, 5), (3, 17)]:
        exact = binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
        assert mcnemar_p_value(lost, gained) == pytest.approx(exact)


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


def test_the_number_of_questions_needed_is_the_number_that_settles_it() -> None:
    comparison = compare(accuracy([True] * 100), accuracy([False] + [True] * 99))
    needed = questions_needed(comparison, 0.02)
    assert needed is not None
    assert loss_interval(0.01 * needed, 0, needed)[1] <= 0.02 < loss_interval(0.01 * (needed - 1), 0, needed - 1)[1]


def test_a_loss_at_the_limit_cannot_be_settled() -> None:
    assert questions_needed(compare(accuracy([True] * 100), accuracy([False] + [True] * 99)), 0.01) is None
