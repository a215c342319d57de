"""A release on one page: the verdict and its reasons first, then every measurement behind it, in one HTML file.

    lightship release demo/checkpoint --recipe recipes/demo.toml --no-promote

The file asks the network for nothing, so that it can be mailed, stored with the release, and opened in ten years. What
a model wrote is escaped.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from lightship.eval import plots
from lightship.eval.questions import Question
from lightship.eval.receipt import Receipt, headline
from lightship.eval.report_style import CSS
from lightship.files import write_text
from lightship.records import (
    Accuracy,
    Agreement,
    AnsweredQuestion,
    Calibration,
    Comparison,
    Fidelity,
    Plan,
    Quantized,
    Staged,
    Throughput,
    Verdict,
    Verification,
)

MOST_LOST = 10
"""Lost questions shown in full."""
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


@dataclass(frozen=True)
class ReportData:
    """Everything that a report shows: the records of one release."""

    release_id: str
    model: str
    """The registered model's name."""
    recipe: str
    """Path of the recipe."""
    source: str
    """Where the source came from: a path, or repository@commit."""
    source_digest: str
    plan: Plan
    calibration: Calibration
    quantized: Quantized
    verification: Verification
    staged: Staged
    source_accuracy: Accuracy
    quantized_accuracy: Accuracy
    agreement: Agreement
    comparison: Comparison
    fidelity: Fidelity
    throughput: Throughput
    verdict: Verdict
    versions: Mapping[str, str]
    """Program -> version, lightship's own included."""
    next_commands: list[str]
    questions: Mapping[str, Question] = field(default_factory=dict)
    """Questions by id, to show the lost ones with their text."""
    receipt: Receipt | None = None
    """Why not, if the release did not pass."""


def write_report(path: Path, release: ReportData) -> None:
    """Write the release's report to `path`, one self-contained HTML file."""
    body = "".join(
        [
            _head(release),
            _summary(release),
            _gate(release.verdict),
            _why_not(release.receipt),
            _same_model(release),
            _size(release),
            _calibration(release),
            _speed(release.throughput),
            _lost(release),
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
        _row(
            "Checkpoint",
            plots.human_bytes(plan.bytes_before),
            plots.human_bytes(plan.bytes_after),
            _change(plan.bytes_before, plan.bytes_after),
        ),
        _row(
            "Routed experts",
            plots.human_bytes(plan.experts_before),
            plots.human_bytes(plan.experts_after),
            _change(plan.experts_before, plan.experts_after),
        ),
        _row(
            f"Accuracy<small>{escape(source.task)}, {comparison.questions:,} questions</small>",
            _percent(comparison.source_accuracy),
            _percent(comparison.quantized_accuracy),
            f"{_points(0.0 - comparison.loss)} points<small>95 %: {_points(-comparison.loss_high)} to "
            f"{_points(-comparison.loss_low)}; p = {comparison.p_value:.2g}</small>",
        ),
        *_further_tasks(source, quantized),
        _row("Answers cut by the token limit", _percent(source.truncated), _percent(quantized.truncated), ""),
        _row("Answers without a readable letter", _percent(source.unparsed), _percent(quantized.unparsed), ""),
        _row(
            "Perplexity<small>held-out text</small>",
            f"{_over_all_tokens((s.perplexity_source, s.tokens) for s in fidelity.scenes):.3f}",
            f"{_over_all_tokens((s.perplexity_quantized, s.tokens) for s in fidelity.scenes):.3f}",
            f"KL {fidelity.kl:.4f} nats<small>same top token {_percent(fidelity.top1_agreement)}</small>",
        ),
        _row(
            f"Queries per minute<small>{most} in flight</small>",
            plots.significant(before.queries_per_minute),
            plots.significant(after.queries_per_minute),
            f"{throughput.ratio(most):.2f}×",
        ),
        _row(
            f"Time to first token, median<small>{most} in flight</small>",
            f"{plots.significant(before.time_to_first_token_ms.p50)} ms",
            f"{plots.significant(after.time_to_first_token_ms.p50)} ms",
            _change(before.time_to_first_token_ms.p50, after.time_to_first_token_ms.p50),
        ),
    ]
    head = '<tr><th></th><th class="num">Source</th><th class="num">Quantized</th><th class="num">Change</th></tr>'
    return f'<h2>Summary</h2><div class="scroll"><table>{head}{"".join(rows)}</table></div>'


def _further_tasks(source: Accuracy, quantized: Accuracy) -> list[str]:
    after = {task.task: task.metrics for task in quantized.tasks}
    return [
        _row(
            f"{escape(task.task)}<small>{escape(metric)}, {len(task.samples):,} documents</small>",
            _percent(value),
            _percent(after[task.task][metric]),
            f"{_points(after[task.task][metric] - value)} points",
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


def _same_model(release: ReportData) -> str:
    c, a = release.comparison, release.agreement
    return (
        "<h2>Is it still the same model?</h2>"
        f"<p>Both models answered the same {c.questions:,} questions. {len(c.lost)} got the right answer from the "
        f"source only, {len(c.gained)} from the quantized one only; on the other "
        f"{c.questions - len(c.lost) - len(c.gained):,} both are right or both are wrong.</p>"
        f"<p>Both decode greedily. They gave the same answer to {_percent(a.same_answer)} of the questions, right or "
        f"wrong, and the same text to {_percent(a.same_text)}; on average the texts part after {a.common_prefix:,.0f} "
        f"characters, {_percent(a.common_share)} of the longer one.</p>"
        + _figure(
            "Accuracy by category",
            plots.accuracy_by_category(release.source_accuracy, release.quantized_accuracy),
            "In brackets, the questions asked; the axis may start above zero. The intervals are of each model alone; "
            "the comparison above is paired, which sees smaller differences than overlapping intervals suggest.",
        )
        + _subjects(c)
        + _figure(
            "Divergence on held-out text",
            plots.kl_by_scene(release.fidelity),
            f"{sum(s.tokens for s in release.fidelity.scenes):,} tokens of held-out text. Zero would be "
            "the identical model; the measure says how far apart the two are, not which one is better.",
        )
    )


def _subjects(comparison: Comparison) -> str:
    rows = "".join(
        f'<tr><td>{escape(s.subject)}</td><td class="num">{s.questions:,}</td><td class="num">{s.lost}</td>'
        f'<td class="num">{s.gained}</td><td class="num">{_points(s.loss)}<small>{_points(s.loss_low)} to '
        f'{_points(s.loss_high)}</small></td><td class="num">{s.p_value:.2g}</td>'
        f'<td class="num">{s.p_adjusted:.2g}</td></tr>'
        for s in comparison.subjects
    )
    heads = ("Questions", "Lost", "Gained", "Loss, points", "p", "p, Holm")
    head = f"<tr><th>Subject</th>{''.join(f'<th class=num>{h}</th>' for h in heads)}</tr>"
    return (
        f'<h3>Loss by subject, paired</h3><div class="scroll"><table>{head}{rows}</table></div><p class="note">The '
        "intervals of all subjects hold together at 95 %. p is of the exact one-sided McNemar test that the subject is "
        "not worse; adjusted by Holm for their number, 0.05 or less says that it is.</p>"
    )


def _size(release: ReportData) -> str:
    return (
        "<h2>Size and rounding</h2>"
        + _figure(
            "Where the bytes are",
            plots.bytes_before_after(release.plan),
            f"Only the routed experts change: they shrink by {_percent(release.plan.experts_shrink)}, scales included. "
            f"On disk the quantized checkpoint takes {plots.human_bytes(release.quantized.bytes_total)}.",
        )
        + _figure(
            "Rounding error of the experts",
            plots.errors_by_layer(release.verification.layers),
            "‖w − w′‖² / ‖w‖² over a layer's experts. It measures weights, not answers: a method that accounts for the "
            "inputs, as GPTQ does, accepts a larger error here for a smaller one in the outputs.",
        )
    )


def _calibration(release: ReportData) -> str:
    calibration = release.calibration
    scenes = ", ".join(f"{escape(scene)} {tokens:,}" for scene, tokens in calibration.tokens.items())
    fewest = min(min(layer.tokens_of_experts()) for layer in calibration.layers)
    starved = calibration.without_tokens
    if starved:
        names = ", ".join(f"<code>{escape(name)}</code>" for name in starved[:MOST_LOST])
        more = f" and {len(starved) - MOST_LOST} more" if len(starved) > MOST_LOST else ""
        who = "1 expert" if len(starved) == 1 else f"{len(starved)} experts"
        said = f"{who} saw no token and could only be rounded without calibration: {names}{more}."
    else:
        said = f"Every expert was reached; the one reached least saw {fewest:,} tokens."
    return f"<h2>Calibration</h2><p>Tokens by scene: {scenes}. {said}</p>" + _figure(
        "What the experts saw",
        plots.coverage(calibration),
        "Tokens routed to each expert, as a multiple of an even share of its layer's. Routing is uneven by nature; an "
        "expert without tokens is a gap in the calibration text.",
    )


def _speed(throughput: Throughput) -> str:
    def panel(title: str, measure: str) -> str:
        groups = []
        for concurrency in throughput.concurrencies:
            pair = [throughput.load(server, concurrency) for server in ("source", "quantized")]
            values = [x.queries_per_minute if measure == "qpm" else getattr(x, measure).p50 for x in pair]
            groups.append((str(concurrency), values[0], values[1]))
        return f"<div>{plots.columns(title, groups, 'requests in flight')}</div>"

    loads = sorted(throughput.loads, key=lambda x: (x.concurrency, x.server != "source"))
    rows = "".join(
        f'<tr><td>{x.server}</td><td class="num">{x.concurrency}</td><td class="num">{x.requests}</td>'
        f'<td class="num">{x.errors}</td><td class="num">{plots.significant(x.queries_per_minute)}</td>'
        f'<td class="num">{plots.significant(x.output_tokens_per_second)}</td>'
        + "".join(
            f'<td class="num">{" / ".join(plots.significant(v) for v in (p.p50, p.p90, p.p99))}</td>'
            for p in (x.time_to_first_token_ms, x.time_per_output_token_ms)
        )
        + "</tr>"
        for x in loads
    )
    heads = (
        "In flight",
        "Requests",
        "Errors",
        "Queries/min",
        "Tokens/s",
        "First token, ms<br>p50 / p90 / p99",
        "Per output token, ms<br>p50 / p90 / p99",
    )
    panels = (
        panel("Queries per minute", "qpm")
        + panel("Time to first token, median ms", "time_to_first_token_ms")
        + panel("Time per output token, median ms", "time_per_output_token_ms")
    )
    return (
        f"<h2>Speed</h2><p>{throughput.prompt_tokens:,} prompt tokens and {throughput.output_tokens:,} output tokens a "
        f"request, the two servers measured in turns on {escape(throughput.machine)}.</p>"
        f'<figure><div class="panels">{panels}</div><figcaption>'
        '<svg style="display:inline;width:9px;height:9px" viewBox="0 0 9 9"><rect width="9" height="9" '
        'class="source"/></svg> '
        'source, <svg style="display:inline;width:9px;height:9px" viewBox="0 0 9 9"><rect width="9" height="9" '
        'class="quantized"/></svg> quantized. Measured on the machine named above and valid for it only: the local '
        "engine expands the weights on a CPU, and its speed says nothing about a GPU's.</figcaption></figure>"
        f"<div "
        f'class="scroll"><table><tr><th>Server</th>{"".join(f"""<th class="num">{h}</th>""" for h in heads)}</tr>{rows}'
        "</table></div>"
    )


def _lost(release: ReportData) -> str:
    lost = release.comparison.lost
    if not lost:
        return "<h2>Questions lost</h2><p>None: the quantized model answers all that the source answers correctly.</p>"
    before = {a.question_id: a for a in release.source_accuracy.answers}
    after = {a.question_id: a for a in release.quantized_accuracy.answers}
    shown = "".join(
        f"<details{' open' * (i == lost[0])}><summary>Question {escape(i)}, {escape(before[i].category)}: "
        f"the answer is {escape(before[i].answer)}, the quantized model says "
        f"{escape(after[i].predicted or 'nothing readable')}</summary>{_question(release, i)}"
        f'<div class="answers">{_answer("Source", before[i])}{_answer("Quantized", after[i])}</div></details>'
        for i in lost[:MOST_LOST]
    )
    more = (
        f"<p class='note'>{len(lost) - MOST_LOST} more are in the release's records.</p>"
        if len(lost) > MOST_LOST
        else ""
    )
    return (
        f"<h2>Questions lost</h2><p>{len(lost)} questions that the source answers correctly and the quantized model "
        "does not "
        f"({len(release.comparison.gained)} went the other way).</p>{shown}{more}"
    )


def _question(release: ReportData, question_id: str) -> str:
    question = release.questions.get(question_id)
    if question is None:
        return ""
    options = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCDEFGHIJ", question.options, strict=False))
    return f"<pre>{escape(question.question)}\n\n{escape(options)}</pre>"


def _answer(who: str, answer: AnsweredQuestion) -> str:
    cut = ", cut by the token limit" if answer.truncated else ""
    said = f'<span class="note">{who}: {escape(answer.predicted or "none")}{cut}</span>'
    return f"<div>{said}<pre>{escape(answer.text)}</pre></div>"


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


def _figure(title: str, svg: str, caption: str) -> str:
    return (
        f'<figure><h3>{title}</h3><div class="scroll"><div class="wide">{svg}</div></div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _row(name: str, source: str, quantized: str, change: str) -> str:
    return f"<tr><td>{name}</td>{''.join(f'<td class=num>{x}</td>' for x in (source, quantized, change))}</tr>"


def _change(before: float, after: float) -> str:
    return _minus(f"{100 * (after / before - 1):+.1f} %")


def _points(fraction: float) -> str:
    return _minus(f"{100 * fraction:+.2f}")


def _minus(number: str) -> str:
    return number.replace("-", "−")


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def _over_all_tokens(perplexities: Iterable[tuple[float, int]]) -> float:
    """The perplexity of several texts together, from each one's perplexity and tokens."""
    pairs = list(perplexities)
    return math.exp(sum(n * math.log(p) for p, n in pairs) / sum(n for _, n in pairs))
