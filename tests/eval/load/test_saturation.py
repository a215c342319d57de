"""The sweep finds the rate that a server of known capacity can do, for two servers side by side."""

from dataclasses import replace
from pathlib import Path

import pytest

from lightship.errors import EvaluationError
from lightship.eval.load.client import REQUEST_SECONDS, Sample
from lightship.eval.load.figures import figures_of
from lightship.eval.load.prompts import PromptText
from lightship.eval.load.saturation import SweepSettings, is_hopeless, judge, patience_of, plan_step, sweep
from lightship.eval.load.search import Search
from lightship.records import Slo
from lightship.summary import sentence
from tests.eval.stub_server import serving

TEXT = PromptText(range(100))
SLO = Slo(ttft_ms=120, tpot_ms=200)
QUICK = SweepSettings(
    "requests a second",
    SLO,
    seconds=0.7,
    warmup_seconds=0.0,
    prompt_tokens=4,
    output_tokens=2,
    start=40.0,
    rest_seconds=0.1,
)


def reckoned_knee(capacity: float) -> float:
    """Where the sweep must find the knee of an ideal server that answers one request after the other."""
    search = Search(QUICK.start)
    while (load := search.next_load()) is not None:
        free_at, waits = 0.0, []
        for request in plan_step(load, TEXT, QUICK).requests:
            begin = max(request.due, free_at)
            free_at = begin + 1 / capacity
            waits.append(1000 * (begin + 0.5 / capacity - request.due))
        search.note(load, sum(wait <= 120 for wait in waits) >= QUICK.share * len(waits))
    return search.highest


@pytest.mark.slow
def test_the_knee_lies_at_the_capacity_and_the_ratio_is_that_of_the_capacities(tokenizer: Path) -> None:
    # A request takes the time of two tokens and waits for those before it: 50 and 100 a second. In such short steps, a
    # queue that grows slowly does not reach the limit, so the knee lies higher, and how much higher can be reckoned.
    with (
        serving(tokenizer, seconds_per_token=0.01, one_at_a_time=True) as slow,
        serving(tokenizer, seconds_per_token=0.005, one_at_a_time=True) as fast,
    ):
        report = sweep({"slow": slow.endpoint, "fast": fast.endpoint}, TEXT, QUICK)
    knees = {x.server: x for x in report.servers}
    assert knees["slow"].highest == pytest.approx(reckoned_knee(50), rel=0.15)
    assert knees["fast"].highest == pytest.approx(reckoned_knee(100), rel=0.15)
    assert report.ratio() == pytest.approx(2, rel=0.2)
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
    plan = plan_step(500.0, TEXT, QUICK)
    assert len(plan.requests) == 350
    assert plan.about.seconds == pytest.approx(0.7, rel=0.2)
    assert len(plan_step(1.0, TEXT, QUICK).requests) == 20
    # The warm-up comes on top: its seconds, or one request for each in flight.
    assert len(plan_step(1.0, TEXT, replace(QUICK, warmup_seconds=3.0)).requests) == 23
    assert len(plan_step(8.0, TEXT, replace(QUICK, unit="requests in flight")).requests) == 8 + 32


def test_a_step_is_hopeless_once_more_have_missed_than_may() -> None:
    def waiting(begun: float) -> Sample:
        return Sample(begun, 2, begun=begun)

    late = [waiting(9.0) for _ in range(3)]
    assert not is_hopeless(late, 9.1, 20, QUICK)
    assert is_hopeless(late, 9.3, 20, QUICK)
    assert not is_hopeless(late[:2], 9.3, 20, QUICK)


def test_patience_ends_when_no_answer_can_be_good_any_more() -> None:
    assert patience_of(QUICK) == pytest.approx(0.12 + 2 * 0.2 + 1)
    # Without one of the limits, a late end may be good.
    for slo in (None, Slo(ttft_ms=5), Slo(tpot_ms=5)):
        assert patience_of(replace(QUICK, slo=slo)) == REQUEST_SECONDS


def test_a_request_in_flight_is_judged_by_what_has_come_of_it() -> None:
    def hopeless(slo: Slo, *arrivals: float) -> bool:
        flying = [Sample(0.0, 11, begun=0.0001, arrivals=list(arrivals)) for _ in range(20)]
        return is_hopeless(flying, 5.0, 20, replace(QUICK, slo=slo))

    assert not hopeless(Slo(ttft_ms=120), 0.1)
    assert hopeless(Slo(ttft_ms=120), 0.2)
    assert hopeless(Slo(ttft_ms=120))
    # Ten tokens are to follow the first, which came 4 s ago.
    assert hopeless(Slo(tpot_ms=390), 1.0)
    assert not hopeless(Slo(tpot_ms=410), 1.0)
    assert not hopeless(Slo(tpot_ms=410))


WITHOUT_LIMITS = replace(QUICK, slo=None, seconds=0.5)


def ending(*ends: float | None) -> list[Sample]:
    """Requests that are due a second after one another, with the ends of their answers, if they have one."""
    samples = [Sample(float(due), 1, begun=float(due), done=True) for due in range(len(ends))]
    for sample, end in zip(samples, ends, strict=True):
        if end is None:
            sample.fail("HTTP 503", "503 busy")
        else:
            sample.arrivals, sample.generated = [end], 1
    return samples


def test_without_limits_a_rate_is_sustained_if_answers_end_as_fast_as_requests_come() -> None:
    def sustained(samples: list[Sample]) -> bool:
        return judge(1.0, figures_of(samples, "it"), samples, None, WITHOUT_LIMITS)[0]

    assert sustained(ending(*(due + 50.0 for due in range(20))))
    assert sustained(ending(*(1.1 * due for due in range(20))))
    assert not sustained(ending(*(1.2 * due for due in range(20))))
    assert not sustained(ending(*(due + 1.0 if due < 10 else None for due in range(20))))


def test_without_limits_a_step_ends_when_its_answers_have_taken_too_long_for_the_rate() -> None:
    samples = ending(*(1.2 * due + 5 for due in range(20)))
    samples[-1].done = False
    # From the first end at 5 s, 19 s of requests may take 21.1 s.
    assert not is_hopeless(samples, 26.0, 20, WITHOUT_LIMITS)
    assert is_hopeless(samples, 26.2, 20, WITHOUT_LIMITS)
    assert not is_hopeless(samples, 26.2, 21, WITHOUT_LIMITS)


def test_a_slow_server_of_endless_capacity_sustains_a_rate(tokenizer: Path) -> None:
    settings = replace(WITHOUT_LIMITS, most=40.0)
    with serving(tokenizer, seconds_per_token=0.5) as server:
        [found] = sweep({"server": server.endpoint}, TEXT, settings).servers
    assert (found.highest, found.refused) == (40, None)


def test_no_step_sends_a_prompt_again_and_both_servers_get_the_same(tokenizer: Path) -> None:
    settings = SweepSettings(
        "requests in flight", Slo(ttft_ms=5000), prompt_tokens=4, output_tokens=2, most=4.0, rest_seconds=0.0
    )
    with serving(tokenizer) as one, serving(tokenizer) as other:
        report = sweep({"one": one.endpoint, "other": other.endpoint}, TEXT, settings)
    assert [s.load for s in report.servers[0].steps] == [1, 2, 4]
    prompts = [sorted(body["prompt"] for body in server.bodies) for server in (one, other)]
    assert len({tuple(p) for p in prompts[0]}) == len(prompts[0]) == 21 + 22 + 24
    assert prompts[0] == prompts[1]


def test_a_server_that_sustains_nothing_leaves_the_others_steps_in_the_report(tokenizer: Path) -> None:
    settings = SweepSettings(
        "requests in flight", Slo(ttft_ms=5000), prompt_tokens=4, output_tokens=2, most=2.0, rest_seconds=0.0
    )
    with serving(tokenizer, status=500) as down, serving(tokenizer) as good:
        report = sweep({"down": down.endpoint, "good": good.endpoint}, TEXT, settings)
    assert [(x.highest, x.refused) for x in report.servers] == [(0, 1), (2, None)]
    assert report.servers[0].steps[0].why == "none of 20 requests was answered"
    assert report.ratio() is None
    assert sentence(report).startswith("down sustains no requests in flight, not 1; good sustains 2 requests in flight")
