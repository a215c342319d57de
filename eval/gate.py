"""The gate: whether a release may be promoted, rule by rule, each with its reason in plain words.

    lightship decide RELEASE --policy recipes/demo.toml

Pure: records and a policy in, verdict out. A rule that the policy does not set does not apply; that the checkpoint
verifies always does. A loss is judged by its interval, so the gate can say that there is too little evidence.
"""

from collections.abc import Iterator

from lightship.eval.losses import loss_rules
from lightship.eval.measures import MEASURES, Evidence
from lightship.policy import Gate, GpuFit
from lightship.records import Decision, Plan, RuleResult, Verdict, Verification


def decide(gate: Gate, evidence: Evidence, champion: Evidence | None = None) -> Verdict:
    """Apply every rule: fail if one fails, else inconclusive if one is, else pass.

    Args:
        champion: the release that would be replaced; without it the rules that compare with it are met.
    """
    rules = [verification_rule(evidence.verification), *loss_rules(gate, evidence, champion)]
    rules += _measured(gate, evidence, champion)
    if gate.fit is not None:
        rules.append(_fit(gate.fit, evidence.plan))
    decisions = {rule.decision for rule in rules}
    overall: Decision = "fail" if "fail" in decisions else "inconclusive" if "inconclusive" in decisions else "pass"
    compared = champion.release_id if champion and gate.by_champion else None
    return Verdict(decision=overall, rules=rules, champion=compared)


def verification_rule(verification: Verification) -> RuleResult:
    """The rule that always applies: every check passed."""
    failed = [check for check in verification.checks if not check.passed]
    return RuleResult(
        rule="verification",
        decision="fail" if failed else "pass",
        value=f"{len(verification.checks) - len(failed)} of {len(verification.checks)} checks passed",
        limit="all",
        explanation=f"{failed[0].name}: {failed[0].detail}." if failed else "The checkpoint is what the loader needs.",
    )


def _measured(gate: Gate, evidence: Evidence, champion: Evidence | None) -> Iterator[RuleResult]:
    for measure in MEASURES:
        for against, limit in gate.limits(measure.rule):
            yield measure.judge(evidence, champion, against, limit)


def _fit(wanted: GpuFit, plan: Plan) -> RuleResult:
    fit = next((fit for fit in plan.fits if fit.gpu.startswith(wanted.gpu)), None)
    tokens = f"{wanted.cache_tokens:,} token{'s' if wanted.cache_tokens > 1 else ''}"
    limit = f"8 GPUs of {wanted.gpu}, room for {tokens}"
    if fit is None:
        known = ", ".join(fit.gpu for fit in plan.fits) or "none, since the plan was made by an older version"
        return RuleResult(
            rule="fit",
            decision="fail",
            value="-",
            limit=limit,
            explanation=f"The plan knows no GPU whose name begins with {wanted.gpu}; it knows {known}.",
        )
    divides = fit.tp in plan.tensor_parallel
    return RuleResult(
        rule="fit",
        decision="pass" if divides and fit.room > 0 and fit.cache_tokens >= wanted.cache_tokens else "fail",
        value=f"{fit.weight_bytes / 1e9:.3g} GB of weights a GPU, room for {fit.cache_tokens:,} tokens",
        limit=limit,
        explanation=f"At TP {fit.tp} each GPU of {fit.gpu} keeps {fit.room / 1e9:.3g} GB for the KV cache."
        if divides
        else f"The experts cannot be divided at TP {fit.tp} into whole groups of 128.",
    )
