"""Figures are what their definitions say, computed by hand for a few samples."""

import pytest

from lightship.errors import EvaluationError
from lightship.eval.load.client import Sample
from lightship.eval.load.figures import figures_of, is_good, warmup_of
from lightship.records import Slo


def sample(due: float | None, begun: float, *arrivals: float, asked: int | None = None) -> Sample:
    """An answer whose tokens came at these times, one each."""
    return Sample(
        due,
        asked or len(arrivals),
        begun=begun,
        written=begun + 0.001,
        arrivals=list(arrivals),
        prompt_tokens=10,
        generated=len(arrivals),
        done=True,
    )


def failed(due: float, kind: str, said: str = "") -> Sample:
    lost = Sample(due, 4, begun=due, written=due)
    lost.fail(kind, said)
    return lost


SAMPLES = [
    sample(0.0, 0.0, 0.1, 0.2, 0.3),
    sample(1.0, 1.01, 1.41, 1.51, 1.81),
    failed(2.0, "HTTP 503", "503 busy"),
    sample(3.0, 3.0, 3.2, asked=4),
]


def test_latencies_count_from_sending_and_rates_from_the_first_due_time_to_the_last_token() -> None:
    found = figures_of(SAMPLES, "the server")
    assert (found.requests, found.errors, found.errors_by_kind) == (4, 1, {"HTTP 503": 1})
    assert found.seconds == pytest.approx(3.2)
    assert found.queries_per_minute == pytest.approx(60 * 3 / 3.2)
    assert found.output_tokens_per_second == pytest.approx(7 / 3.2)
    assert found.input_tokens_per_second == pytest.approx(30 / 3.2)
    assert found.time_to_first_token_ms.p50 == pytest.approx(200)
    assert found.time_per_output_token_ms.p50 == pytest.approx((100 + 200) / 2)
    assert found.inter_token_latency_ms is not None
    assert found.inter_token_latency_ms.p50 == pytest.approx(100)
    assert found.end_to_end_ms is not None
    assert found.end_to_end_ms.p50 == pytest.approx(300)
    assert found.short_answers == 1


def test_lateness_is_due_to_written_of_all_that_were_written() -> None:
    late = figures_of(SAMPLES, "the server").lateness_ms
    assert late is not None
    assert late.p50 == pytest.approx(1)
    assert late.max == pytest.approx(11)
    assert figures_of([sample(None, 0.0, 0.1)], "the server").lateness_ms is None


def test_goodput_counts_a_failure_as_missed_and_each_limit_for_itself() -> None:
    both = figures_of(SAMPLES, "the server", Slo(ttft_ms=250, tpot_ms=150)).goodput
    assert both is not None
    assert both.share == pytest.approx(2 / 4)
    assert both.queries_per_minute == pytest.approx(60 * 2 / 3.2)
    assert [is_good(s, Slo(tpot_ms=150)) for s in SAMPLES] == [True, False, False, True]
    assert [is_good(s, Slo(ttft_ms=150)) for s in SAMPLES] == [True, False, False, False]


def test_warm_up_is_dropped_by_requests_or_seconds_and_counted() -> None:
    assert warmup_of(SAMPLES, 0, 1.5) == 2
    assert warmup_of(SAMPLES, 3, 1.5) == 3
    found = figures_of(SAMPLES, "the server", warmup=1)
    assert (found.requests, found.warmup_requests) == (3, 1)
    assert found.seconds == pytest.approx(2.2)


def test_a_server_that_answers_nothing_is_named_with_its_words() -> None:
    with pytest.raises(EvaluationError, match="the server failed all 1 requests, the last with: 503 busy"):
        figures_of([failed(0.0, "HTTP 503", "503 busy")], "the server")
    with pytest.raises(EvaluationError, match="the server failed all 0 requests"):
        figures_of(SAMPLES, "the server", warmup=9)
