"""What samples amount to: latencies, rates, errors by kind, goodput, and how well the schedule was kept."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lightship.errors import EvaluationError
from lightship.eval.load.client import Sample
from lightship.records import Figures, Goodput, Lateness, Percentiles, Slo


def figures_of(samples: Sequence[Sample], where: str, slo: Slo | None = None, warmup: int = 0) -> Figures:
    """Figures of the samples, in the order of sending, without the first `warmup`.

    Raises:
        EvaluationError: no request after the warm-up was answered; `where` and the last error are in the message.
    """
    counted = samples[warmup:]
    return Figures(
        **figures_of_time(counted, seconds_of(counted), where, slo), warmup_requests=len(samples) - len(counted)
    )


def figures_of_time(samples: Sequence[Sample], seconds: float, where: str, slo: Slo | None = None) -> dict[str, Any]:
    """The fields of `Figures` for samples that took `seconds` together, which need not follow one another.

    Raises:
        EvaluationError: none was answered.
    """
    good = [s for s in samples if s.error is None]
    if not good:
        last = f", the last with: {samples[-1].said}" if samples else ""
        raise EvaluationError(f"{where} failed all {len(samples)} requests{last}")
    return {
        "requests": len(samples),
        "errors": len(samples) - len(good),
        "seconds": seconds,
        "queries_per_minute": 60 * len(good) / seconds,
        "output_tokens_per_second": sum(s.generated for s in good) / seconds,
        "input_tokens_per_second": sum(s.prompt_tokens for s in good) / seconds,
        "time_to_first_token_ms": _percentiles([to_first_ms(s) for s in good]),
        # An answer of one token has no time between tokens.
        "time_per_output_token_ms": _percentiles([per_token_ms(s) for s in good if s.generated > 1] or [0.0]),
        "inter_token_latency_ms": _percentiles(
            [1000 * (b - a) for s in good for a, b in zip(s.arrivals, s.arrivals[1:], strict=False)] or [0.0]
        ),
        "end_to_end_ms": _percentiles([1000 * (s.arrivals[-1] - s.begun) for s in good]),
        "errors_by_kind": dict(sorted(Counter(s.error for s in samples if s.error).items())),
        "short_answers": sum(s.generated < s.asked for s in good),
        "lateness_ms": lateness_of(samples),
        "goodput": goodput_of(samples, seconds, slo) if slo else None,
    }


def seconds_of(samples: Sequence[Sample]) -> float:
    """From the first request's due time, or its sending at fixed concurrency, to the end of the last answer."""
    starts = [s.begun if s.due is None else s.due for s in samples]
    ends = [s.arrivals[-1] for s in samples if s.arrivals]
    return max(max(ends, default=0.0) - min(starts, default=0.0), 1e-9)


def warmup_of(samples: Sequence[Sample], requests: int, seconds: float) -> int:
    """How many samples are warm-up: the first `requests`, and all that began within `seconds` of the first."""
    starts = [s.begun if s.due is None else s.due for s in samples]
    return max(requests, sum(start < starts[0] + seconds for start in starts)) if samples else 0


def to_first_ms(sample: Sample) -> float:
    """Milliseconds from sending to the first token."""
    return 1000 * (sample.arrivals[0] - sample.begun)


def per_token_ms(sample: Sample) -> float:
    """Milliseconds a token after the first; 0 for an answer of one token."""
    return 1000 * (sample.arrivals[-1] - sample.arrivals[0]) / max(1, sample.generated - 1)


def is_good(sample: Sample, slo: Slo) -> bool:
    """Whether an answer is there and came within the limits."""
    return (
        sample.error is None
        and (slo.ttft_ms is None or to_first_ms(sample) <= slo.ttft_ms)
        and (slo.tpot_ms is None or per_token_ms(sample) <= slo.tpot_ms)
    )


def goodput_of(samples: Sequence[Sample], seconds: float, slo: Slo) -> Goodput:
    """The requests that were answered within the limits, as a share of all and as a rate."""
    good = sum(is_good(s, slo) for s in samples)
    return Goodput(slo=slo, share=good / len(samples), queries_per_minute=60 * good / seconds)


def lateness_of(samples: Sequence[Sample]) -> Lateness | None:
    """Due to written, of the requests that were written; None without due times."""
    import numpy as np

    late = [1000 * (s.written - s.due) for s in samples if s.due is not None and s.written]
    if not late:
        return None
    p50, p99, most = np.percentile(late, [50, 99, 100]).tolist()
    return Lateness(p50=p50, p99=p99, max=most)


def _percentiles(values: Sequence[float]) -> Percentiles:
    import numpy as np

    p50, p90, p99 = np.percentile(values, [50, 90, 99]).tolist()
    return Percentiles(p50=p50, p90=p90, p99=p99)
