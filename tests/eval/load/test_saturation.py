"""The sweep finds the rate that a server of known capacity can do, for two servers side by side."""

from pathlib import Path

import pytest

from lightship.errors import EvaluationError
from lightship.eval.load.client import Sample
from lightship.eval.load.prompts import PromptText
from lightship.eval.load.saturation import SweepSettings, is_hopeless, patience_of, plan_step, sweep
from lightship.records import Slo
from tests.eval.stub_server import serving

TEXT = PromptText(range(100))
SLO = Slo(ttft_ms=120, tpot_ms=200)
QUICK = SweepSettings(
    "requests a second",
    SLO,
    seconds=1.0,
    warmup_seconds=0.0,
    prompt_tokens=4,
    output_tokens=2,
    start=16.0,
    rest_seconds=0.1,
)


@pytest.mark.slow
def test_the_knee_lies_at_the_capacity_and_the_ratio_is_that_of_the_capacities(tokenizer: Path) -> None:
    # A request takes the time of two tokens and waits for those before it: 50 and 100 a second. In a second, a queue
    # that grows slowly does not reach the limit, so the knee may lie somewhat higher.
    with (
        serving(tokenizer, seconds_per_token=0.01, one_at_a_time=True) as slow,
        serving(tokenizer, seconds_per_token=0.005, one_at_a_time=True) as fast,
    ):
        report = sweep({"slow": slow.endpoint, "fast": fast.endpoint}, TEXT, QUICK)
    knees = {x.server: x for x in report.servers}
    assert 15 <= knees["slow"].highest <= 70
    assert 30 <= knees["fast"].highest <= 140
    assert report.ratio() == pytest.approx(2, rel=0.5)
    for found in report.servers:
        assert found.refused is not None
        assert found.highest < found.refused <= 1.12 * found.highest
        assert all(s.sustained == (s.load <= found.highest) for s in found.steps)
    assert report.criterion == "90% of the requests with TTFT at most 120 ms and TPOT at most 200 ms"


@pytest.mark.slow
def test_without_limits_the_knee_in_flight_is_where_throughput_stops_growing(tokenizer: Path) -> None:
    settings = SweepSettings(
        "requests in flight", warmup_seconds=0.0, prompt_tokens=4, output_tokens=2, rest_seconds=0.0
    )
    with serving(tokenizer, seconds_per_token=0.01, one_at_a_time=True) as server:
        [found] = sweep({"server": server.endpoint}, TEXT, settings).servers
    assert (found.highest, found.refused) == (1, 2)


def test_a_server_that_keeps_no_limit_is_named_with_the_last_share(tokenizer: Path) -> None:
    settings = SweepSettings(
        "requests in flight", Slo(ttft_ms=0.001), warmup_seconds=0.0, prompt_tokens=4, output_tokens=2
    )
    with (
        serving(tokenizer) as server,
        pytest.raises(EvaluationError, match=r"sustained no load, not even 1: 0\.0% of 20 requests.*loosen the limits"),
    ):
        sweep({"server": server.endpoint}, TEXT, settings)


def test_a_step_lasts_as_long_as_asked_and_never_has_few_requests() -> None:
    plan = plan_step(50.0, TEXT, QUICK)
    assert len(plan.requests) == 50
    assert plan.about.seconds == pytest.approx(1, rel=0.4)
    assert len(plan_step(1.0, TEXT, QUICK).requests) == 20


def test_a_step_is_hopeless_once_more_have_missed_than_may() -> None:
    def waiting(begun: float) -> Sample:
        return Sample(begun, 2, begun=begun)

    late = [waiting(9.0) for _ in range(3)]
    assert not is_hopeless(late, 9.1, 20, QUICK)
    assert is_hopeless(late, 9.3, 20, QUICK)
    assert not is_hopeless(late[:2], 9.3, 20, QUICK)


def test_patience_ends_when_no_answer_can_be_good_any_more() -> None:
    assert patience_of(QUICK) == pytest.approx(0.12 + 2 * 0.2 + 1)
    assert patience_of(SweepSettings("requests a second", Slo(ttft_ms=5), seconds=7)) == 7
