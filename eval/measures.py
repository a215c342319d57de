"""The gate's rules on a single number: what is measured, which way is better, how it is said.

    lightship decide RELEASE

A value may be held against a limit, against the source's value, or against the champion's of the day.
"""

from collections.abc import Callable
from dataclasses import dataclass

from lightship.records import (
    Accuracy,
    Against,
    Calibration,
    Comparison,
    Decision,
    Fidelity,
    Plan,
    RuleResult,
    Throughput,
    Verification,
)
from lightship.summary import size


@dataclass(frozen=True)
class Evidence:
    """The records that a gate reads of one release."""

    release_id: str
    plan: Plan
    calibration: Calibration
    verification: Verification
    source: Accuracy
    quantized: Accuracy
    comparison: Comparison
    fidelity: Fidelity
    throughput: Throughput


ROUNDING = 1e-9
"""0.005 + 0.01 may come out below 0.015, and a value that is the limit meets it."""
Number = Callable[[Evidence], float]


@dataclass(frozen=True)
class Measure:
    """A rule on a number."""

    rule: str
    small_is_good: bool
    value: Number
    at_source: Number
    """The same of the source."""
    show: Callable[[float], str]
    means: Callable[[Evidence, str], str]
    """The value in a sentence, without its full stop."""
    unusable: Callable[[Evidence], str | None] = lambda _: None
    """Why the value says nothing; then the rule is not met."""
    conditions: Callable[[Evidence], object] = lambda _: None
    """What must be the same of two releases for their values to be compared."""

    def judge(self, evidence: Evidence, champion: Evidence | None, against: Against, limit: float) -> RuleResult:
        """Hold the value against one limit."""
        value = self.value(evidence)
        bound = "at most" if self.small_is_good else "at least"
        shown = self.show(limit)
        side = "above" if self.small_is_good else "below"
        if against == "champion" and champion is None:
            return no_champion(self.rule, self.show(value), f"at most {shown} {side} the champion's")
        other = 0.0
        if against != "limit":
            of = champion if against == "champion" else evidence
            assert of is not None
            other = (self.value if against == "champion" else self.at_source)(of)
            bound, shown = "at most", f"{shown} {side} the {against}'s {self.show(other)}"
        edge = other + limit if self.small_is_good or against == "limit" else other - limit
        worse = value - edge if self.small_is_good else edge - value
        decision: Decision = "pass" if worse <= ROUNDING * abs(edge) else "fail"
        sentence = self.means(evidence, self.show(value))
        if why := self.unusable(evidence):
            decision, sentence = "fail", why
        elif against == "champion" and champion and self.conditions(evidence) != self.conditions(champion):
            decision = "inconclusive"
            sentence += f"; the champion {champion.release_id} was not measured in the same way, release it again"
        elif against != "limit":
            whose = f"champion {champion.release_id}" if against == "champion" and champion else "source"
            sentence += f"; the {whose} has {self.show(other)}"
        return RuleResult(
            rule=self.rule,
            decision=decision,
            value=self.show(value),
            limit=f"{bound} {shown}",
            explanation=f"{sentence}.",
            against=against,
        )


def no_champion(rule: str, value: str, limit: str) -> RuleResult:
    """A rule that compares with the champion, where there is none."""
    return RuleResult(
        rule=rule,
        decision="pass",
        value=value,
        limit=limit,
        explanation="There is no champion yet, or it is this release; there is nothing to compare with.",
        against="champion",
    )


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def _nats(kl: float) -> str:
    return f"{kl:.4f} nats"


def _times(ratio: float) -> str:
    return f"{ratio:.2f}×"


def _most(evidence: Evidence) -> int:
    return max(evidence.throughput.concurrencies)


def _ttft_ratio(evidence: Evidence) -> float:
    after, before = (evidence.throughput.load(server, _most(evidence)) for server in ("quantized", "source"))
    return after.time_to_first_token_ms.p50 / before.time_to_first_token_ms.p50


def _worst_scene(evidence: Evidence) -> float:
    return max(scene.kl for scene in evidence.fidelity.scenes)


def _starved(evidence: Evidence) -> float:
    experts = sum(len(layer.tokens_of_experts()) for layer in evidence.calibration.layers)
    return len(evidence.calibration.starved) / experts


def _failed_requests(evidence: Evidence) -> str | None:
    failed = sum(load.errors for load in evidence.throughput.loads)
    return f"{failed} requests failed while the servers were timed, so the ratio says nothing" if failed else None


def _questions(evidence: Evidence) -> object:
    return evidence.quantized.task, evidence.quantized.overrides


def _texts(evidence: Evidence) -> object:
    fidelity = evidence.fidelity
    return fidelity.text_digest, fidelity.activations, [(scene.scene, scene.tokens) for scene in fidelity.scenes]


def _calibrated_on(evidence: Evidence) -> object:
    return evidence.calibration.text_digest, evidence.calibration.tokens, evidence.calibration.token_floor


def _load(evidence: Evidence) -> object:
    throughput = evidence.throughput
    return throughput.machine, throughput.prompt_tokens, throughput.output_tokens, throughput.concurrencies


MEASURES = (
    Measure(
        "kl", True, lambda e: e.fidelity.kl, lambda _: 0.0, _nats,
        lambda _, value: f"On held-out text the next-token distributions differ by {value} a token on average",
        conditions=_texts,
    ),
    Measure(
        "kl_worst_scene", True, _worst_scene, lambda _: 0.0, _nats,
        lambda e, value: f"They differ most on {max(e.fidelity.scenes, key=lambda s: s.kl).scene}, by {value} a token",
        conditions=_texts,
    ),
    Measure(
        "top1_agreement", False, lambda e: e.fidelity.top1_agreement, lambda _: 1.0, percent,
        lambda _, value: f"Source and result find the same token likeliest {value} of the time", conditions=_texts,
    ),
    Measure(
        "truncated", True, lambda e: e.quantized.truncated, lambda e: e.source.truncated, percent,
        lambda _, value: f"{value} of the quantized model's answers were cut by the token limit", conditions=_questions,
    ),
    Measure(
        "unparsed", True, lambda e: e.quantized.unparsed, lambda e: e.source.unparsed, percent,
        lambda _, value: f"No answer letter could be read from {value} of the quantized model's answers",
        conditions=_questions,
    ),
    Measure(
        "starved_experts", True, _starved, lambda _: 0.0, percent,
        lambda e, value: f"{value} of the experts saw fewer than {e.calibration.token_floor:,} calibration tokens",
        conditions=_calibrated_on,
    ),
    Measure(
        "throughput_ratio", False, lambda e: e.throughput.ratio(_most(e)), lambda _: 1.0, _times,
        lambda e, value: f"With {_most(e)} requests in flight it answers {value} as many queries a minute",
        unusable=_failed_requests, conditions=_load,
    ),
    Measure(
        "ttft_ratio", True, _ttft_ratio, lambda _: 1.0, _times,
        lambda e, value: f"With {_most(e)} requests in flight the first token takes {value} as long, at the median",
        unusable=_failed_requests, conditions=_load,
    ),
    Measure(
        "bytes_after", True, lambda e: e.plan.bytes_after, lambda e: e.plan.bytes_before, size,
        lambda _, value: f"The result's tensors take {value}",
    ),
    Measure(
        "experts_shrink", False, lambda e: e.plan.experts_shrink, lambda _: 0.0, percent,
        lambda _, value: f"The routed experts' weights, scales included, take {value} fewer bytes",
    ),
)  # fmt: skip
"""In the order in which they are shown."""
