"""What a record says in one line for people, and as metrics and curves for MLflow."""

from collections.abc import Iterable
from functools import singledispatch
from statistics import mean

from lightship.records import (
    Accuracy,
    Agreement,
    Calibration,
    Comparison,
    Fidelity,
    LoadReport,
    Plan,
    Promoted,
    Quantized,
    Record,
    Staged,
    SweepReport,
    Throughput,
    Verdict,
    Verification,
)

NAMED = 3
"""Names that a sentence gives; it counts the others."""


def size(nbytes: float) -> str:
    """Bytes for people, in the decimal units in which disks and checkpoints are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


@singledispatch
def sentence(record: Record) -> str:
    """One line about the record."""
    raise TypeError(type(record))


@singledispatch
def metrics(record: Record) -> dict[str, float]:
    """The record's numbers, by MLflow metric name."""
    raise TypeError(type(record))


@singledispatch
def curves(_: Record) -> dict[str, dict[int, float]]:
    """The record's series, by MLflow metric name: step -> value.

    The step is the layer's number, the requests in flight or the questions answered, and the name's first part says
    which: `by_layer`, `by_concurrency`, `by_questions`. A series of one point is none; its metric says it already.
    """
    return {}


def _series(values: Iterable[tuple[str, int, float | None]]) -> dict[str, dict[int, float]]:
    """Name, step and value, of which some are missing -> those series that have a shape."""
    found: dict[str, dict[int, float]] = {}
    for name, step, value in values:
        if value is not None:
            found.setdefault(name, {})[step] = value
    return {name: points for name, points in found.items() if len(points) > 1}


def layer_number(layer_name: str) -> int:
    """Of `model.layers.3.mlp`, 3."""
    return int(next(part for part in layer_name.split(".") if part.isdigit()))


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None


@sentence.register
def _(plan: Plan) -> str:
    return (
        f"{len(plan.expert_layers)} MoE layers; {size(plan.bytes_before)} -> {size(plan.bytes_after)}, "
        f"routed experts -{plan.experts_shrink:.1%}; experts divide at TP {', '.join(map(str, plan.tensor_parallel))}"
    )


@metrics.register
def _(plan: Plan) -> dict[str, float]:
    return {
        "size/bytes_after": plan.bytes_after,
        "size/bytes_before": plan.bytes_before,
        "size/experts_shrink": plan.experts_shrink,
    }


@sentence.register
def _(calibration: Calibration) -> str:
    least = min(min(layer.tokens_of_experts()) for layer in calibration.layers)
    parts = [
        f"{sum(calibration.tokens.values()):,} tokens of {len(calibration.tokens)} scenes",
        f"the least used expert saw {least:,}",
    ]
    if starved := calibration.starved:
        parts.append(f"{len(starved)} experts saw fewer than {calibration.token_floor:,}: {_some(starved)}")
    if outliers := calibration.with_outliers:
        parts.append(f"outliers stretch the input scales of {_some(outliers)}")
    return "; ".join(parts)


@metrics.register
def _(calibration: Calibration) -> dict[str, float]:
    rounded = [expert for layer in calibration.layers for expert in layer.experts]
    outputs = {
        "calibration/output_error_w13": _mean(e.w13_output_error for e in rounded),
        "calibration/output_error_w2": _mean(e.w2_output_error for e in rounded),
    }
    return {
        "calibration/tokens": sum(calibration.tokens.values()),
        "calibration/least_expert_tokens": min(expert.tokens for expert in rounded),
        "calibration/experts_starved": len(calibration.starved),
        "calibration/experts_without_tokens": len(calibration.without_tokens),
        "calibration/layers_with_outliers": len(calibration.with_outliers),
        "calibration/error_w13": mean(e.w13_error for e in rounded),
        "calibration/error_w2": mean(e.w2_error for e in rounded),
        **{k: v for k, v in outputs.items() if v is not None},
    }


@curves.register
def _(calibration: Calibration) -> dict[str, dict[int, float]]:
    points: list[tuple[str, int, float | None]] = []
    for layer in calibration.layers:
        number, tokens = layer_number(layer.layer_name), layer.tokens_of_experts()
        points += [
            ("by_layer/error_w13", number, _mean(e.w13_error for e in layer.experts)),
            ("by_layer/error_w2", number, _mean(e.w2_error for e in layer.experts)),
            ("by_layer/output_error_w13", number, _mean(e.w13_output_error for e in layer.experts)),
            ("by_layer/output_error_w2", number, _mean(e.w2_output_error for e in layer.experts)),
            ("by_layer/least_expert_tokens", number, min(tokens)),
            ("by_layer/experts_starved", number, len(layer.starved(calibration.token_floor))),
        ]
    return _series(points)


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


@sentence.register
def _(quantized: Quantized) -> str:
    resumed = f", {quantized.experts_resumed:,} of them finished before" if quantized.experts_resumed else ""
    return f"{quantized.method}; {quantized.experts:,} experts{resumed}; {size(quantized.bytes_total)}"


@metrics.register
def _(quantized: Quantized) -> dict[str, float]:
    return {"quantize/seconds": quantized.seconds, "quantize/experts": quantized.experts}


@sentence.register
def _(verification: Verification) -> str:
    failed = [check for check in verification.checks if not check.passed]
    if failed:
        return "; ".join(f"{check.name}: {check.detail}" for check in failed)
    warned = sum(check.warned for check in verification.checks)
    compared = f"; {verification.checks[-1].detail}" if verification.layers else ""
    return f"{len(verification.checks)} checks passed{f', {warned} with a warning' if warned else ''}{compared}"


@metrics.register
def _(verification: Verification) -> dict[str, float]:
    values: dict[str, float] = {"verify/failed_checks": sum(not c.passed for c in verification.checks)}
    if verification.layers:
        values["verify/error_w13"] = mean(e.w13 for e in verification.layers)
        values["verify/error_w2"] = mean(e.w2 for e in verification.layers)
    return values


@curves.register
def _(verification: Verification) -> dict[str, dict[int, float]]:
    return _series(
        (f"by_layer/verified_error_{name}", layer_number(e.layer_name), value)
        for e in verification.layers
        for name, value in (("w13", e.w13), ("w2", e.w2))
    )


@sentence.register
def _(staged: Staged) -> str:
    return f"{staged.engine} engine, TP {staged.tensor_parallel}, ready after {staged.ready_seconds:.1f} s"


@metrics.register
def _(staged: Staged) -> dict[str, float]:
    return {"stage/ready_seconds": staged.ready_seconds}


@sentence.register
def _(accuracy: Accuracy) -> str:
    return (
        f"{accuracy.accuracy:.1%} of {len(accuracy.answers)} questions ({accuracy.task}); "
        f"{accuracy.truncated:.1%} truncated, {accuracy.unparsed:.1%} unparsed"
        + "".join(f"; {t.task} {next(iter(t.metrics.values())):.1%} of {len(t.samples)}" for t in accuracy.tasks)
    )


@metrics.register
def _(accuracy: Accuracy) -> dict[str, float]:
    return {
        "accuracy": accuracy.accuracy,
        "truncated": accuracy.truncated,
        "unparsed": accuracy.unparsed,
        **{f"accuracy/{name}": correct / asked for name, (correct, asked) in accuracy.by_category().items()},
        **{f"task/{t.task}/{metric}": value for t in accuracy.tasks for metric, value in t.metrics.items()},
        **{f"task/{t.task}/truncated": t.truncated for t in accuracy.tasks},
    }


@sentence.register
def _(agreement: Agreement) -> str:
    return (
        f"the same answer to {agreement.same_answer:.1%} of {agreement.questions} questions, the same text to "
        f"{agreement.same_text:.1%}; texts part after {agreement.common_prefix:.0f} characters"
    )


@metrics.register
def _(agreement: Agreement) -> dict[str, float]:
    return {
        "agreement/same_answer": agreement.same_answer,
        "agreement/same_text": agreement.same_text,
        "agreement/common_prefix": agreement.common_prefix,
        "agreement/common_share": agreement.common_share,
    }


@sentence.register
def _(fidelity: Fidelity) -> str:
    return f"KL {fidelity.kl:.4f} nats a token, same top token {fidelity.top1_agreement:.1%}"


@metrics.register
def _(fidelity: Fidelity) -> dict[str, float]:
    by_scene = {}
    for s in fidelity.scenes:
        by_scene[f"fidelity/{s.scene}/kl"] = s.kl
        by_scene[f"fidelity/{s.scene}/perplexity_source"] = s.perplexity_source
        by_scene[f"fidelity/{s.scene}/perplexity_quantized"] = s.perplexity_quantized
    return {"fidelity/kl": fidelity.kl, "fidelity/top1_agreement": fidelity.top1_agreement, **by_scene}


@curves.register
def _(fidelity: Fidelity) -> dict[str, dict[int, float]]:
    return _series(("by_layer/kl", layer, kl) for layer, kl in enumerate(fidelity.kl_by_layer))


@sentence.register
def _(throughput: Throughput) -> str:
    ratios = (f"{throughput.ratio(c):.2f}x at concurrency {c}" for c in throughput.concurrencies)
    return f"queries a minute over the source's: {', '.join(ratios)}"


@metrics.register
def _(throughput: Throughput) -> dict[str, float]:
    values = {}
    for load in throughput.loads:
        name = f"throughput/{load.server}/c{load.concurrency}"
        values[f"{name}/queries_per_minute"] = load.queries_per_minute
        values[f"{name}/output_tokens_per_second"] = load.output_tokens_per_second
        values[f"{name}/ttft_p50_ms"] = load.time_to_first_token_ms.p50
        values[f"{name}/tpot_p50_ms"] = load.time_per_output_token_ms.p50
        values[f"{name}/errors"] = load.errors
    for report in throughput.arrivals:
        for served in report.servers:
            name = f"throughput/{served.server}/{report.workload.arrivals}"
            values[f"{name}/queries_per_minute"] = served.queries_per_minute
            values[f"{name}/ttft_p50_ms"] = served.time_to_first_token_ms.p50
            values[f"{name}/ttft_p99_ms"] = served.time_to_first_token_ms.p99
            values[f"{name}/tpot_p50_ms"] = served.time_per_output_token_ms.p50
            values[f"{name}/errors"] = served.errors
            if served.goodput:
                values[f"{name}/goodput"] = served.goodput.share
    return values | {f"throughput/ratio/c{c}": throughput.ratio(c) for c in throughput.concurrencies}


@curves.register
def _(throughput: Throughput) -> dict[str, dict[int, float]]:
    points: list[tuple[str, int, float | None]] = []
    for load in throughput.loads:
        first, token = load.time_to_first_token_ms, load.time_per_output_token_ms
        for name, value in (
            ("queries_per_minute", load.queries_per_minute),
            ("output_tokens_per_second", load.output_tokens_per_second),
            ("ttft_p50_ms", first.p50),
            ("ttft_p99_ms", first.p99),
            ("tpot_p50_ms", token.p50),
            ("tpot_p99_ms", token.p99),
        ):
            points.append((f"by_concurrency/{load.server}_{name}", load.concurrency, value))
    points += [("by_concurrency/ratio", c, throughput.ratio(c)) for c in throughput.concurrencies]
    return _series(points)


@sentence.register
def _(report: LoadReport) -> str:
    about, last = report.workload, report.servers[-1]
    parts = [f"{about.name}: {last.queries_per_minute:.1f} queries a minute"]
    if (ratio := report.ratio()) is not None:
        parts.append(f"{ratio:.2f}x those of {report.servers[0].server}")
    if last.goodput:
        parts.append(f"{last.goodput.share:.1%} within the limits")
    if about.repeated_tokens:
        parts.append(f"{about.repeated_tokens:.0%} of the prompt tokens repeat an earlier prefix")
    if about.length_factor != 1:
        parts.append(f"lengths times {about.length_factor:.3g}")
    if about.prompts_clipped or about.outputs_clipped:
        parts.append(
            f"{about.prompts_clipped} prompts and {about.outputs_clipped} answers cut to {about.window} tokens"
        )
    return "; ".join(parts)


@sentence.register
def _(report: SweepReport) -> str:
    found = "; ".join(
        f"{x.server} sustains {f'{x.highest:g}' if x.highest else 'no'} {report.unit}"
        + (f", not {x.refused:g}" if x.refused else ", the sweep's end")
        for x in report.servers
    )
    ratio = report.ratio()
    return found + (f"; {ratio:.2f}x" if ratio is not None else "") + f" ({report.criterion})"


@sentence.register
def _(comparison: Comparison) -> str:
    return (
        f"{comparison.source_accuracy:.1%} -> {comparison.quantized_accuracy:.1%}; "
        f"loss {100 * comparison.loss:+.1f} points "
        f"(95 %: {100 * comparison.loss_low:+.1f} to {100 * comparison.loss_high:+.1f}); "
        f"{len(comparison.lost)} lost, {len(comparison.gained)} gained"
    )


@metrics.register
def _(comparison: Comparison) -> dict[str, float]:
    return {
        "accuracy_loss": comparison.loss,
        "accuracy_loss_low": comparison.loss_low,
        "accuracy_loss_high": comparison.loss_high,
        "accuracy_loss_p_value": comparison.p_value,
        "accuracy_loss_subjects_worse": sum(s.p_adjusted <= 0.05 for s in comparison.subjects),
    }


@curves.register
def _(comparison: Comparison) -> dict[str, dict[int, float]]:
    return _series(
        (f"by_questions/{name}", answered, value)
        for answered, stage in zip(comparison.looks, comparison.accuracy_at_looks, strict=False)
        for name, value in (
            ("source_accuracy", stage[0]),
            ("quantized_accuracy", stage[1]),
            ("accuracy_loss", stage[0] - stage[1]),
        )
    )


@sentence.register
def _(verdict: Verdict) -> str:
    open_rules = [rule for rule in verdict.rules if rule.decision != "pass"]
    if not open_rules:
        return f"{verdict.decision}: all {len(verdict.rules)} rules"
    return f"{verdict.decision}: " + "; ".join(f"{rule.rule}: {rule.explanation}" for rule in open_rules)


@metrics.register
def _(verdict: Verdict) -> dict[str, float]:
    return {"gate/rules_not_passed": sum(rule.decision != "pass" for rule in verdict.rules)}


@sentence.register
def _(promoted: Promoted) -> str:
    before = f", in place of version {promoted.previous_version}" if promoted.previous_version else ""
    override = promoted.override
    spite = f", by {override.by} in spite of the verdict {override.verdict}: {override.reason}" if override else ""
    return f"{promoted.model} version {promoted.version} became {promoted.alias}{before}{spite}"


@metrics.register
def _(promoted: Promoted) -> dict[str, float]:
    return {"promoted_version": float(promoted.version)}
