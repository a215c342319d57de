"""A release on one page: the verdict and its reasons first, then every measurement behind it, in one HTML file.

    lightship release demo/checkpoint --recipe recipes/demo.toml --no-promote

The file asks the network for nothing, so that it can be mailed, stored with the release, and opened in ten years. What
a model wrote is escaped.
"""

import math
from collections.abc import Iterable
from html import escape
from pathlib import Path

from lightship.eval.drawing import human_bytes, significant
from lightship.eval.receipt import Receipt, headline
from lightship.eval.report_answers import lost_questions, same_model
from lightship.eval.report_checkpoint import calibration_coverage, size_and_rounding
from lightship.eval.report_data import ReportData
from lightship.eval.report_parts import change, percent, points, row
from lightship.eval.report_speed import speed
from lightship.eval.report_style import CSS
from lightship.files import write_text
from lightship.records import Accuracy, Verdict

HEADLINES = {
    "pass": "Pass: this release may be promoted",
    "fail": "Fail: this release must not be promoted",
    "inconclusive": "Inconclusive: there is too little evidence to promote this release",
}
RULES = {
    "verification": "Checkpoint verification",
    "accuracy_loss": "Accuracy loss",
    "subject_loss": "Loss in any subject",
    "kl": "KL divergence",
    "kl_worst_scene": "KL divergence, worst scene",
    "top1_agreement": "Same likeliest token",
    "truncated": "Answers cut by the token limit",
    "unparsed": "Answers without a readable letter",
    "starved_experts": "Experts with too few calibration tokens",
    "throughput_ratio": "Throughput, quantized over source",
    "ttft_ratio": "Time to first token, quantized over source",
    "bytes_after": "Bytes of the result",
    "experts_shrink": "Shrink of the routed experts",
    "fit": "Fit on eight GPUs",
}
AGAINST = {"limit": "", "source": ", against the source", "champion": ", against the champion"}
SYMBOLS = {"pass": "✓ pass", "warn": "! warn", "fail": "✗ fail", "inconclusive": "? inconclusive"}


def write_report(path: Path, release: ReportData) -> None:
    """Write the release's report to `path`, one self-contained HTML file."""
    body = "".join(
        [
            _head(release),
            _summary(release),
            _gate(release.verdict),
            _why_not(release.receipt),
            same_model(release),
            size_and_rounding(release),
            calibration_coverage(release),
            speed(release.throughput),
            lost_questions(release),
            _identity(release),
        ]
    )
    title = f"Release {escape(release.release_id[:12])}"
    write_text(
        path,
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{CSS}</style></head>'
        f"<body><main>{body}</main></body></html>\n",
    )


def _head(release: ReportData) -> str:
    verdict = release.verdict
    against = [r for r in verdict.rules if r.decision == verdict.decision and verdict.decision != "pass"]
    if against:
        reasons = f"<ul>{''.join(f'<li>{escape(r.explanation)}</li>' for r in against)}</ul>"
    else:
        reasons = f"<p>All {len(verdict.rules)} rules of the gate are met.</p>"
    return (
        f'<p class="eyebrow">lightship release report</p><h1>{escape(release.model)}</h1>'
        f'<p class="soft">Release <code>{escape(release.release_id[:12])}</code> of {escape(release.source)}, '
        f"quantized to W4AFP8 with {escape(release.quantized.method)}</p>"
        f'<div class="verdict {verdict.decision}"><strong>{HEADLINES[verdict.decision]}</strong>{reasons}</div>'
    )


def _summary(release: ReportData) -> str:
    plan, comparison, fidelity, throughput = release.plan, release.comparison, release.fidelity, release.throughput
    source, quantized = release.source_accuracy, release.quantized_accuracy
    most = max(throughput.concurrencies)
    before, after = throughput.load("source", most), throughput.load("quantized", most)
    rows = [
        row(
            "Checkpoint",
            human_bytes(plan.bytes_before),
            human_bytes(plan.bytes_after),
            change(plan.bytes_before, plan.bytes_after),
        ),
        row(
            "Routed experts",
            human_bytes(plan.experts_before),
            human_bytes(plan.experts_after),
            change(plan.experts_before, plan.experts_after),
        ),
        row(
            f"Accuracy<small>{escape(source.task)}, {comparison.questions:,} questions</small>",
            percent(comparison.source_accuracy),
            percent(comparison.quantized_accuracy),
            f"{points(0.0 - comparison.loss)} points<small>95 %: {points(-comparison.loss_high)} to "
            f"{points(-comparison.loss_low)}; p = {comparison.p_value:.2g}</small>",
        ),
        *_further_tasks(source, quantized),
        row(
            "Same answer<small>right or wrong, greedily decoded</small>",
            "",
            percent(release.agreement.same_answer),
            f"{percent(release.agreement.same_text)}<small>the same text</small>",
        ),
        row("Answers cut by the token limit", percent(source.truncated), percent(quantized.truncated), ""),
        row("Answers without a readable letter", percent(source.unparsed), percent(quantized.unparsed), ""),
        row(
            "Perplexity<small>held-out text</small>",
            f"{_over_all_tokens((s.perplexity_source, s.tokens) for s in fidelity.scenes):.3f}",
            f"{_over_all_tokens((s.perplexity_quantized, s.tokens) for s in fidelity.scenes):.3f}",
            f"KL {fidelity.kl:.4f} nats<small>same top token {percent(fidelity.top1_agreement)}</small>",
        ),
        row(
            f"Queries per minute<small>{most} in flight</small>",
            significant(before.queries_per_minute),
            significant(after.queries_per_minute),
            f"{throughput.ratio(most):.2f}×",
        ),
        row(
            f"Time to first token, median<small>{most} in flight</small>",
            f"{significant(before.time_to_first_token_ms.p50)} ms",
            f"{significant(after.time_to_first_token_ms.p50)} ms",
            change(before.time_to_first_token_ms.p50, after.time_to_first_token_ms.p50),
        ),
    ]
    head = '<tr><th></th><th class="num">Source</th><th class="num">Quantized</th><th class="num">Change</th></tr>'
    return f'<h2>Summary</h2><div class="scroll"><table>{head}{"".join(rows)}</table></div>'


def _further_tasks(source: Accuracy, quantized: Accuracy) -> list[str]:
    after = {task.task: task.metrics for task in quantized.tasks}
    return [
        row(
            f"{escape(task.task)}<small>{escape(metric)}, {len(task.samples):,} documents</small>",
            percent(value),
            percent(after[task.task][metric]),
            f"{points(after[task.task][metric] - value)} points",
        )
        for task in source.tasks
        for metric, value in task.metrics.items()
    ]


def _gate(verdict: Verdict) -> str:
    rows = "".join(
        f'<tr><td><span class="tag {r.decision}">{SYMBOLS[r.decision]}</span></td><td>{RULES[r.rule]}'
        f"{AGAINST[r.against]}<small>{escape(r.explanation)}</small></td>"
        f'<td class="num">{escape(r.value)}<small>{escape(r.interval or "")}</small><small>{escape(r.limit)}</small>'
        "</td></tr>"
        for r in verdict.rules
    )
    head = '<tr><th>Decision</th><th>Rule</th><th class="num">Measured, limit</th></tr>'
    return f'<h2>The gate</h2><div class="scroll"><table class="gate">{head}{rows}</table></div>'


def _why_not(receipt: Receipt | None) -> str:
    if receipt is None:
        return ""
    rules = "".join(
        f"<h3>{RULES[rule.rule]}{AGAINST[rule.against]}: {rule.decision}</h3><pre>{escape(rule.arithmetic)}</pre>"
        for rule in receipt.rules
        if rule.arithmetic
    )
    steps = "".join(f"<li>{escape(step)}</li>" for step in receipt.next)
    return f"<h2>Why not</h2><p>{escape(headline(receipt))}.</p>{rules}<h3>Next</h3><ul>{steps}</ul>"


def _identity(release: ReportData) -> str:
    accuracy, staged = release.quantized_accuracy, release.staged
    rows = [
        ("Release", release.release_id),
        ("Source", release.source),
        ("Source digest", release.source_digest),
        ("Recipe", release.recipe),
        ("Manifest digest", release.quantized.manifest_digest),
        ("Calibration text digest", release.calibration.text_digest),
        ("Checkpoint", release.quantized.path),
        ("Evaluation settings", "; ".join(f"{k}: {v}" for k, v in accuracy.overrides.items()) or "stock"),
        (
            "Evaluated engine",
            f"{staged.engine}, tensor parallel {staged.tensor_parallel}, ready in {staged.ready_seconds:.1f} s",
        ),
        ("Experts divide at", "tensor parallel " + ", ".join(map(str, release.plan.tensor_parallel))),
        *release.versions.items(),
    ]
    table = "".join(f'<tr><td>{escape(k)}</td><td class="mono">{escape(v)}</td></tr>' for k, v in rows)
    checks = "".join(
        f'<tr><td><span class="tag {c.outcome}">{SYMBOLS[c.outcome]}</span></td>'
        f"<td>{escape(c.name)}<small>{escape(c.detail)}</small></td></tr>"
        for c in release.verification.checks
    )
    commands = escape("\n".join(release.next_commands))
    served_with = " ".join(["lightship", *staged.command[staged.command.index("serve") :]])
    return (
        f'<h2>Checkpoint verification</h2><div class="scroll"><table class="checks">{checks}</table></div>'
        f'<h2>Identity</h2><table class="identity">{table}</table>'
        f"<h2>Serve it</h2><p>The evaluated server was started with</p><pre>{escape(served_with)}</pre>"
        f"<p>Its first greedy completion was</p><pre>{escape(staged.greeting)}</pre>"
        f"<h2>Next</h2><pre>{commands}</pre>"
        "<footer>Intervals are at 95 %. The accuracy difference is paired by question, with Tango's score interval and "
        "the exact McNemar test.</footer>"
    )


def _over_all_tokens(perplexities: Iterable[tuple[float, int]]) -> float:
    """The perplexity of several texts together, from each one's perplexity and tokens."""
    pairs = list(perplexities)
    return math.exp(sum(n * math.log(p) for p, n in pairs) / sum(n for _, n in pairs))
