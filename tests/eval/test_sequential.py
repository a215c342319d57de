"""Stopping early is wrong no more often than stated, and saves questions."""

import numpy as np
import pytest

from lightship.eval.boundaries import boundaries, spending
from lightship.eval.interval import ONE_QUESTION, score
from lightship.eval.sequential import LossPolicy, deviation_at, judge
from lightship.eval.stages import stage_ends

STAGES = (0.25, 0.5, 0.75, 1.0)


def test_boundaries_are_those_of_the_published_tables() -> None:
    """Lan and DeMets with O'Brien and Fleming's spending, one-sided 2.5 %, equal steps: as in gsDesign and ldbounds."""
    assert boundaries((1.0,), 0.025) == pytest.approx([1.95996], abs=1e-4)
    assert boundaries((0.5, 1.0), 0.025) == pytest.approx([2.9626, 1.9686], abs=1e-4)
    assert boundaries(STAGES, 0.025) == pytest.approx([4.3326, 2.9631, 2.3590, 2.0141], abs=1e-4)


def test_the_whole_error_is_spent_at_the_end_and_hardly_any_early() -> None:
    assert spending(1.0, 0.025) == pytest.approx(0.025)
    assert spending(0.25, 0.025) < 1e-4


def test_a_path_without_drift_crosses_as_often_as_the_error_says() -> None:
    rng = np.random.default_rng(1)
    fractions = np.array([0.1, 0.3, 0.6, 1.0])
    steps = rng.standard_normal((200_000, 4)) * np.sqrt(np.diff(fractions, prepend=0.0))
    z = steps.cumsum(axis=1) / np.sqrt(fractions)
    crossed = (z >= np.array(boundaries(tuple(fractions), 0.025))).any(axis=1).mean()
    assert crossed == pytest.approx(0.025, abs=0.0011)


def test_one_look_is_the_fixed_verdict_and_an_early_look_is_stricter() -> None:
    assert deviation_at([400], 400, 0.95) == pytest.approx(1.95996, abs=1e-4)
    assert (
        deviation_at([100], 400, 0.95) > deviation_at([100, 200], 400, 0.95) > deviation_at([100, 200, 400], 400, 0.95)
    )


@pytest.mark.parametrize(
    ("lost", "gained", "looks", "step"),
    [
        (0, 0, [1000], "continue"),
        (0, 0, [1000, 2000], "pass"),
        (200, 0, [1000], "fail"),
        (60, 20, [1000, 2000, 3000, 4000], "inconclusive"),
        (20, 18, [1000, 2000, 3000, 4000], "pass"),
    ],
)
def test_each_look_says_what_comes_next(lost: int, gained: int, looks: list[int], step: str) -> None:
    assert judge(lost, gained, looks, 4000, LossPolicy(0.01)).step == step


def test_an_open_look_says_how_many_questions_would_settle_it() -> None:
    judged = judge(5, 3, [200], 200, LossPolicy(0.02))
    assert judged.step == "inconclusive"
    assert judged.needed is not None
    assert judged.more == judged.needed - 200
    scaled = judged.needed / 200
    settled = judge(round(5 * scaled), round(3 * scaled), [judged.needed + 200], judged.needed + 200, LossPolicy(0.02))
    assert settled.step == "pass"


def simulate(
    loss: float,
    discordance: float,
    stages: tuple[float, ...],
    *,
    limit: float = 0.02,
    planned: int = 2000,
    releases: int = 4000,
) -> tuple[float, float, float]:
    """Fractions of releases that pass and that fail, and the mean number of questions asked."""
    rng = np.random.default_rng(7)
    p_lost, p_gained = (discordance + loss) / 2, (discordance - loss) / 2
    lost, gained = np.zeros(releases), np.zeros(releases)
    open_, passed, failed, asked = np.ones(releases, bool), 0, 0, 0
    ends = stage_ends(planned, stages)
    for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False), start=1):
        asked += (end - start) * int(open_.sum())
        drawn = rng.multinomial(end - start, [p_lost, p_gained, 1 - p_lost - p_gained], releases)
        lost, gained = lost + drawn[:, 0], gained + drawn[:, 1]
        statistic = score(limit, lost, gained, end, ONE_QUESTION)
        z = deviation_at(ends[:number], planned, 0.95)
        passed += int((open_ & (statistic <= -z)).sum())
        failed += int((open_ & (statistic >= z)).sum())
        open_ &= np.abs(statistic) < z
    return passed / releases, failed / releases, asked / releases


NOISE = 3 * (0.025 * 0.975 / 4000) ** 0.5
"""Three standard errors of a rate of 2.5 % over the simulated releases."""


@pytest.mark.parametrize("stages", [(1.0,), STAGES, (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)], ids=["fixed", "four", "six"])
@pytest.mark.parametrize("discordance", [0.02, 0.1])
def test_a_loss_at_the_limit_passes_and_fails_no_more_often_than_stated(
    discordance: float, stages: tuple[float, ...]
) -> None:
    false_pass, false_fail, _ = simulate(0.02, discordance, stages)
    assert false_pass <= 0.025 + NOISE
    assert false_fail <= 0.025 + NOISE


@pytest.mark.parametrize("limit", [0.01, 0.05])
@pytest.mark.parametrize("planned", [100, 400, 1000])
@pytest.mark.parametrize("stages", [STAGES, (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)], ids=["four", "six"])
def test_both_errors_over_all_looks_stay_below_their_level_by_exact_computation(
    stages: tuple[float, ...], planned: int, limit: float
) -> None:
    for p_gained in (1e-9, 0.003, 0.02):
        false_pass, false_fail = exact_rates(limit, p_gained, stage_ends(planned, stages))
        assert false_pass <= 0.025
        assert false_fail <= 0.025


def exact_rates(limit: float, p_gained: float, ends: list[int]) -> tuple[float, float]:
    """The probabilities of `pass` and of `fail` where the loss is exactly the limit, from look to look."""
    from scipy.signal import fftconvolve
    from scipy.stats import multinomial

    p_lost = p_gained + limit
    most = [int(min(ends[-1], ends[-1] * p + 8 * (ends[-1] * p) ** 0.5 + 12)) + 1 for p in (p_lost, p_gained)]
    lost, gained = np.meshgrid(np.arange(most[0]), np.arange(most[1]), indexing="ij")
    undecided = np.zeros(most)
    undecided[0, 0] = 1
    passed = failed = 0.0
    for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False), start=1):
        counts = np.stack([lost, gained, np.maximum(end - start - lost - gained, 0)], axis=-1)
        step = multinomial.pmf(counts, end - start, [p_lost, p_gained, 1 - p_lost - p_gained])
        undecided = np.maximum(fftconvolve(undecided, step)[: most[0], : most[1]], 0)
        statistic, z = score(limit, lost, gained, end, ONE_QUESTION), deviation_at(ends[:number], ends[-1], 0.95)
        passed += float(undecided[statistic <= -z].sum())
        failed += float(undecided[statistic >= z].sum())
        undecided[np.abs(statistic) >= z] = 0
    return passed, failed


def test_looking_as_if_each_look_were_the_only_one_would_be_wrong_too_often() -> None:
    rng = np.random.default_rng(3)
    drawn = rng.multinomial(500, [0.06, 0.04, 0.9], (4000, 4)).cumsum(axis=1)
    statistic = np.stack(
        [score(0.02, drawn[:, i, 0], drawn[:, i, 1], 500 * (i + 1), ONE_QUESTION) for i in range(4)], axis=1
    )
    assert (statistic <= -1.96).any(axis=1).mean() > 0.025 + NOISE


def test_stages_save_questions_and_cost_little_power() -> None:
    fixed, staged = simulate(0.0, 0.04, (1.0,)), simulate(0.0, 0.04, STAGES)
    assert fixed[0] > 0.95
    assert staged[0] > fixed[0] - 0.02
    assert staged[2] < 0.75 * 2000
    clear = simulate(0.08, 0.1, STAGES)
    assert clear[1] > 0.99
    assert clear[2] < 0.5 * 2000
    assert clear[0] == 0
