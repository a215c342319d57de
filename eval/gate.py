"""The gate: whether a release may be promoted, rule by rule, each with its reason in plain words.

    lightship release demo/checkpoint --recipe recipes/demo.toml --no-promote

Pure: records in, verdict out. A rule that the recipe does not set does not apply; that the checkpoint verifies always
does. An accuracy loss is judged by its 95 % interval, so the gate can say that there is too little evidence either way.
"""

from collections.abc import Iterator

from lightship.eval.comparison import questions_needed
from lightship.recipe import Gate
from lightship.records import (
    Accuracy,
    Comparison,
    Decision,
    Fidelity,
    Plan,
    RuleResult,
    Throughput,
    Verdict,
    Verification,
)


def decide(
    gate: Gate,
    *,
    plan: Plan,
    verification: Verification,
    comparison: Comparison,
    quantized: Accuracy,
    fidelity: Fidelity,
    throughput: Throughput,
) -> Verdict:
    """Apply every rule: fail if one fails, else inconclusive if one is, else pass."""
    rules = [_verification(verification)]
    if gate.accuracy_loss is not None:
        rules.append(_accuracy_loss(comparison, gate.accuracy_loss))
    rules += _measures(gate, plan, quantized, fidelity, throughput)
    decisions = {r.decision for r in rules}
    overall: Decision = "fail" if "fail" in decisions else "inconclusive" if "inconclusive" in decisions else "pass"
    return Verdict(decision=overall, rules=rules)


def _verification(verification: Verification) -> RuleResult:
    failed = [check for check in verification.checks if not check.passed]
    return RuleResult(
        rule="verification",
        decision="fail" if failed else "pass",
        value=f"{len(verification.checks) - len(failed)} of {len(verification.checks)} checks passed",
        limit="all",
        explanation=f"{failed[0].name}: {failed[0].detail}." if failed else "The checkpoint is what the loader needs.",
    )


def _accuracy_loss(comparison: Comparison, limit: float) -> RuleResult:
    seen = (
        f"The quantized model lost {len(comparison.lost)} and gained {len(comparison.gained)} "
        f"of {comparison.questions} questions"
    )
    decision: Decision
    if comparison.loss_high <= limit:
        decision = "pass"
        reason = f"with 95 % confidence it loses at most {_points(comparison.loss_high)}"
    elif comparison.loss_low > limit:
        decision = "fail"
        reason = f"with 95 % confidence it loses at least {_points(comparison.loss_low)}"
    else:
        decision = "inconclusive"
        reason = f"the loss may be anything from {_range(comparison)} points; " + _what_is_missing(comparison, limit)
    return RuleResult(
        rule="accuracy_loss",
        decision=decision,
        value=f"{_points(comparison.loss)} ({_range(comparison)})",
        limit=f"at most {_points(limit)}",
        explanation=f"{seen}; {reason}.",
    )


def _what_is_missing(comparison: Comparison, limit: float) -> str:
    needed = questions_needed(comparison, limit)
    if needed is None:
        return "it is so close to the limit that more questions will hardly settle it"
    return f"needs about {_rounded_up(needed - comparison.questions):,} more questions"


def _measures(
    gate: Gate, plan: Plan, quantized: Accuracy, fidelity: Fidelity, throughput: Throughput
) -> Iterator[RuleResult]:
    """The rules on a single number."""
    if gate.kl is not None:
        text = f"On held-out text the next-token distributions differ by {fidelity.kl:.4f} nats a token on average."
        yield _measured("kl", fidelity.kl <= gate.kl, f"{fidelity.kl:.4f} nats", f"at most {gate.kl:g} nats", text)
    if gate.truncated is not None:
        text = f"{_percent(quantized.truncated)} of the quantized model's answers were cut by the token limit."
        yield _measured(
            "truncated",
            quantized.truncated <= gate.truncated,
            _percent(quantized.truncated),
            f"at most {_percent(gate.truncated)}",
            text,
        )
    if gate.unparsed is not None:
        text = f"No answer letter could be read from {_percent(quantized.unparsed)} of the quantized model's answers."
        yield _measured(
            "unparsed",
            quantized.unparsed <= gate.unparsed,
            _percent(quantized.unparsed),
            f"at most {_percent(gate.unparsed)}",
            text,
        )
    if gate.experts_shrink is not None:
        text = f"The routed experts' weights, scales included, take {_percent(plan.experts_shrink)} fewer bytes."
        yield _measured(
            "experts_shrink",
            plan.experts_shrink >= gate.experts_shrink,
            _percent(plan.experts_shrink),
            f"at least {_percent(gate.experts_shrink)}",
            text,
        )
    if gate.throughput_ratio is not None:
        concurrency = max(throughput.concurrencies)
        ratio = throughput.ratio(concurrency)
        failed = sum(load.errors for load in throughput.loads)
        text = f"With {concurrency} requests in flight it answers {ratio:.2f} times as many queries a minute."
        if failed:
            text = f"{failed} requests failed while the servers were timed, so the ratio says nothing."
        yield _measured(
            "throughput_ratio",
            ratio >= gate.throughput_ratio and not failed,
            f"{ratio:.2f}×",
            f"at least {gate.throughput_ratio:g}×",
            text,
        )


def _measured(rule: str, met: bool, value: str, limit: str, explanation: str) -> RuleResult:
    return RuleResult(rule=rule, decision="pass" if met else "fail", value=value, limit=limit, explanation=explanation)


def _points(fraction: float) -> str:
    return f"{_signed(fraction)} points"


def _range(comparison: Comparison) -> str:
    return f"{_signed(comparison.loss_low)} to {_signed(comparison.loss_high)}"


def _signed(fraction: float) -> str:
    """In percent, with a typographic minus, and zero without a sign."""
    return f"{100 * fraction:.2f}".replace("-0.00", "0.00").replace("-", "−")


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def _rounded_up(count: int) -> int:
    """To two significant digits: an estimate should not look exact."""
    step: int = 10 ** max(len(str(count)) - 2, 0)
    return -(-count // step) * step
