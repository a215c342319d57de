"""Records as tables on the terminal."""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from statistics import mean

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table

from lightship import summary
from lightship.files import read_json
from lightship.records import (
    Accuracy,
    Agreement,
    Calibration,
    Comparison,
    Fidelity,
    LoadReport,
    Percentiles,
    Plan,
    PlannedTensor,
    Preflight,
    Promoted,
    Saturation,
    Staged,
    SweepReport,
    Throughput,
    Verdict,
    Verification,
)
from lightship.summary import size

PARTS = {"routed experts": "routed experts, int4 group 128", "unexpected": "not in the declaration"}
SHOWN = 6
"""Starved experts that a row names."""
OUTCOMES = {"pass": "[green]pass[/]", "warn": "[yellow]warn[/]", "fail": "[bold red]FAIL[/]"}
FINDINGS = 5
"""Findings of a check that the table shows; the JSON record has more."""
COLOURS = {"pass": "green", "fail": "red", "inconclusive": "yellow"}


def show(table: RenderableType) -> None:
    """Print a table, or several; lines are not cut when the output is not a terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(table)


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(
        title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold"
    )
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def parts_table(preflight: Preflight) -> Table:
    """Where the bytes are, before and after."""
    table = _table("what", "tensors", "before", "after", "change", "of the result")
    rows = [(p.part, p.tensors, p.bytes_before, p.bytes_after, "") for p in preflight.parts]
    for part, tensors, before, after, style in [
        *rows,
        ("all", preflight.tensors, preflight.bytes_before, preflight.bytes_after, "bold"),
    ]:
        change, share = f"{after / before - 1:+.1%}" if before else "-", f"{after / preflight.bytes_after:.1%}"
        table.add_row(PARTS.get(part, part), str(tensors), size(before), size(after), change, share, style=style)
    return table


def tensor_table(tensors: list[PlannedTensor]) -> Table:
    """Every tensor's fate."""
    table = _table("tensor", "action", "dtype", "shape", "before", "after")
    for t in tensors:
        action = f"{t.action}, converted" if t.converted else t.action
        table.add_row(t.name, action, t.dtype, str(t.shape), size(t.bytes_before), size(t.bytes_after))
    return table


def degrees_table(preflight: Preflight) -> Table:
    """Which degrees of tensor parallelism divide each part of the result, and so all of it."""
    parts = list(preflight.degrees[0].obstacles)
    table = _table("TP", *parts, "all", "first obstacle")
    for degree in preflight.degrees:
        divided = [not degree.obstacles[part] for part in parts]
        marks = ["[green]yes[/]" if ok else "[red]no[/]" for ok in (*divided, degree.possible)]
        found = degree.all_obstacles
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        table.add_row(str(degree.tp), *marks, found[0] + more if found else "-")
    return table


def fits_table(preflight: Preflight) -> Table:
    """The result on GPUs, and the room that is left there."""
    table = _table("8 GPUs of", "weights a GPU", "left for KV cache", "tokens in cache (bf16)")
    for fit in preflight.fits:
        room = f"{fit.room / 1e9:.1f} GB" if fit.room > 0 else "[red]does not fit[/]"
        divided = fit.tp in preflight.tensor_parallel
        tokens = f"{fit.cache_tokens:,}" if divided else f"TP {fit.tp} does not divide it"
        table.add_row(fit.gpu, size(fit.weight_bytes), room, tokens)
    return table


def needs_table(preflight: Preflight) -> Table:
    """What the work takes: memory, disk, time."""
    table = _table("need", "", "there is", "arithmetic")
    for need in preflight.needs:
        mark = size(need.needed) if need.enough else f"[red]{size(need.needed)}[/]"
        table.add_row(need.what, mark, size(need.available), need.arithmetic)
    for duration in preflight.durations:
        table.add_row(f"time to {duration.what}", _hours(duration.seconds), "", duration.arithmetic)
    return table


def time_sentence(preflight: Preflight) -> str:
    """How long what is left takes, and its price."""
    done = f"{preflight.experts_done:,} of {preflight.experts:,} experts are done"
    if preflight.seconds is None or preflight.probe is None or preflight.price is None:
        return f"{done}; no time without the probe"
    return (
        f"{done}; {_hours(preflight.seconds)} for the rest on {preflight.probe.device} "
        f"(the longer of read + write and round + forward), {preflight.price:.2f} at {preflight.gpu_hour:.2f} an hour; "
        f"one expert: {preflight.probe.expert_arithmetic}"
    )


def _hours(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def calibration_table(calibration: Calibration) -> Table:
    """What each layer's experts saw and how well they were rounded."""
    table = _table(
        "layer",
        "tokens an expert: least / median / most",
        "starved",
        "how",
        "error w13 / w2",
        "of outputs",
        "input scales",
    )
    for layer in calibration.layers:
        tokens = sorted(layer.tokens_of_experts())
        starved = layer.starved(calibration.token_floor)
        ways = Counter(expert.how for expert in layer.experts)
        flag = " [yellow]outliers[/]" if layer.w13_input.outliers or layer.w2_input.outliers else ""
        table.add_row(
            layer.layer_name.removesuffix(".mlp"),
            f"{tokens[0]:,} / {tokens[len(tokens) // 2]:,} / {tokens[-1]:,}",
            ", ".join(map(str, starved[:SHOWN])) + (" …" if len(starved) > SHOWN else "") if starved else "-",
            "; ".join(f"{how}: {count}" for how, count in ways.most_common()),
            f"{mean(e.w13_error for e in layer.experts):.2%} / {mean(e.w2_error for e in layer.experts):.2%}",
            _mean_error(e.w13_output_error for e in layer.experts)
            + " / "
            + _mean_error(e.w2_output_error for e in layer.experts),
            f"{layer.w13_input.scale:.3g}, {layer.w2_input.scale:.3g}{flag}",
        )
    return table


def _mean_error(errors: Iterable[float | None]) -> str:
    known = [error for error in errors if error is not None]
    return f"{mean(known):.2%}" if known else "-"


def verification_table(verification: Verification) -> Table:
    """Each check and what it found, a finding a line."""
    table = _table("check", "", "found")
    for check in verification.checks:
        named = check.findings[:FINDINGS]
        more = [f"… and {check.found - len(named):,} more"] if check.found > len(named) else []
        found = "\n".join([*named, *more]) or check.detail
        table.add_row(check.name, OUTCOMES[check.outcome], escape(found))
    return table


def error_table(verification: Verification) -> Table:
    """Each layer's error against the source; the largest of each column stands out."""
    table = _table("error against the source", "w1, w3", "w2")
    worst = [max(e.w13 for e in verification.layers), max(e.w2 for e in verification.layers)]
    for layer in verification.layers:
        marks = ["bold" if error == most else "none" for error, most in zip((layer.w13, layer.w2), worst, strict=True)]
        table.add_row(layer.layer_name, f"[{marks[0]}]{layer.w13:.5f}[/]", f"[{marks[1]}]{layer.w2:.5f}[/]")
    return table


def accuracy_table(accuracy: Accuracy) -> Table:
    """Correct answers by category."""
    table = _table("category", "correct", "asked", "accuracy")
    for category, (correct, asked) in accuracy.by_category().items():
        table.add_row(category, str(correct), str(asked), f"{correct / asked:.1%}")
    return table


def tasks_table(accuracy: Accuracy) -> Table:
    """The further tasks' metrics."""
    table = _table("task", "metric / filter", "value", "documents", "truncated")
    for task in accuracy.tasks:
        for metric, value in task.metrics.items():
            table.add_row(task.task, metric, f"{value:.1%}", str(len(task.samples)), f"{task.truncated:.1%}")
    return table


def throughput_table(throughput: Throughput) -> Table:
    """Each load's figures."""
    table = _table(
        "server", "concurrency", "queries/min", "tokens/s", "TTFT p50/p90/p99 ms", "TPOT p50/p90/p99 ms", "errors"
    )
    for load in throughput.loads:
        table.add_row(
            load.server,
            str(load.concurrency),
            f"{load.queries_per_minute:.1f}",
            f"{load.output_tokens_per_second:.1f}",
            _latency(load.time_to_first_token_ms),
            _latency(load.time_per_output_token_ms),
            str(load.errors),
        )
    return table


def load_table(report: LoadReport) -> Table:
    """One workload's figures, a column a server."""
    table = _table(report.workload.name, *(x.server for x in report.servers))

    def row(name: str, *values: str) -> None:
        table.add_row(name, *values)

    servers = report.servers
    row("requests, errors", *(f"{x.requests:,}, {_errors(x.errors, x.errors_by_kind)}" for x in servers))
    row("queries a minute", *(f"{x.queries_per_minute:.1f}" for x in servers))
    row("output tokens/s", *(f"{x.output_tokens_per_second:.1f}" for x in servers))
    row("input tokens/s", *(f"{x.input_tokens_per_second or 0:.1f}" for x in servers))
    row("TTFT p50 / p90 / p99 ms", *(_latency(x.time_to_first_token_ms) for x in servers))
    row("TPOT p50 / p90 / p99 ms", *(_fine(x.time_per_output_token_ms) for x in servers))
    row("ITL p50 / p90 / p99 ms", *(_fine(x.inter_token_latency_ms) for x in servers))
    row("end to end p50 / p90 / p99 ms", *(_latency(x.end_to_end_ms) if x.end_to_end_ms else "" for x in servers))
    if all(x.lateness_ms for x in servers):
        late = (x.lateness_ms for x in servers if x.lateness_ms)
        row("sent late p50 / p99 / most ms", *(f"{x.p50:.1f} / {x.p99:.1f} / {x.max:.1f}" for x in late))
    if all(x.goodput for x in servers):
        good = (x.goodput for x in servers if x.goodput)
        row("within the limits, and a minute", *(f"{x.share:.1%}, {x.queries_per_minute:.1f}" for x in good))
    if any(x.short_answers for x in servers):
        row("answers shorter than asked", *(str(x.short_answers) for x in servers))
    return table


def _errors(errors: int, kinds: dict[str, int]) -> str:
    return f"{errors} ({', '.join(f'{n} {kind}' for kind, n in kinds.items())})" if errors else "0"


def _fine(p: Percentiles | None) -> str:
    return f"{p.p50:.1f} / {p.p90:.1f} / {p.p99:.1f}" if p else ""


def sweep_table(report: SweepReport) -> Table:
    """Every step of every server, in the order of the loads."""
    table = _table("server", report.unit, "sustained", "queries/min", "TTFT p50/p99 ms", "TPOT p50/p99 ms", "why")

    def rows(server: Saturation) -> None:
        for step in sorted(server.steps, key=lambda x: x.load):
            mark = "[green]yes[/]" if step.sustained else "[yellow]no[/]"
            values = ["", "", ""]
            if step.figures:
                first, each = step.figures.time_to_first_token_ms, step.figures.time_per_output_token_ms
                values = [f"{step.figures.queries_per_minute:.1f}", f"{first.p50:.0f} / {first.p99:.0f}"]
                values.append(f"{each.p50:.1f} / {each.p99:.1f}")
            table.add_row(server.server, f"{step.load:g}", mark, *values, step.why)

    for server in report.servers:
        rows(server)
    return table


def _latency(p: Percentiles) -> str:
    return f"{p.p50:.0f} / {p.p90:.0f} / {p.p99:.0f}"


def print_release(directory: Path) -> None:
    """The end of a release: what changed, the verdict, and where to look next."""
    plan = read_json(directory / "plan.json", Plan)
    agreement = read_json(directory / "agreement.json", Agreement)
    comparison = read_json(directory / "comparison.json", Comparison)
    fidelity = read_json(directory / "fidelity.json", Fidelity)
    throughput = read_json(directory / "throughput.json", Throughput)
    staged = read_json(directory / "staged.json", Staged)
    verdict = read_json(directory / "verdict.json", Verdict)
    table = _table("", "source (FP8)", "W4AFP8", "change", title=f"[bold]release {directory.name}[/]")
    table.add_row(
        "size",
        size(plan.bytes_before),
        size(plan.bytes_after),
        f"{plan.bytes_after / plan.bytes_before - 1:+.1%}",
    )
    table.add_row("routed experts", size(plan.experts_before), size(plan.experts_after), f"{-plan.experts_shrink:+.1%}")
    table.add_row(
        f"accuracy, {comparison.questions} questions",
        f"{comparison.source_accuracy:.1%}",
        f"{comparison.quantized_accuracy:.1%}",
        f"{100 * (comparison.quantized_accuracy - comparison.source_accuracy):+.1f} points "
        f"(95 %: {-100 * comparison.loss_high:+.1f} to {-100 * comparison.loss_low:+.1f})",
    )
    table.add_row("the same answer, the same text", "", "", f"{agreement.same_answer:.1%}, {agreement.same_text:.1%}")
    for scene in fidelity.scenes:
        table.add_row(
            f"perplexity, {scene.scene}",
            f"{scene.perplexity_source:.2f}",
            f"{scene.perplexity_quantized:.2f}",
            f"KL {scene.kl:.4f} nats, same top token {scene.top1_agreement:.1%}",
        )
    for c in throughput.concurrencies:
        before, after = throughput.load("source", c), throughput.load("quantized", c)
        table.add_row(
            f"queries/min, concurrency {c}",
            f"{before.queries_per_minute:.1f}",
            f"{after.queries_per_minute:.1f}",
            f"{throughput.ratio(c):.2f}x",
        )
    print()
    show(table)
    if comparison.subjects:
        print()
        show(subjects_table(comparison))
    print()
    show(rules_table(verdict))
    promoted = directory / "promoted.json"
    outcome = (
        summary.sentence(read_json(promoted, Promoted)) if promoted.is_file() else "not promoted: it stays challenger"
    )
    local = f"mlflow ui --backend-store-uri sqlite:///{directory.parent.parent / 'mlflow.db'}"
    server = os.environ.get("MLFLOW_TRACKING_URI", "")
    tracking = server if server.startswith("http") else local
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"\nverdict: [bold {COLOURS[verdict.decision]}]{verdict.decision}[/]; {outcome}")
    console.print(
        "\nwhere to look next\n"
        f"  report      {directory / 'report.html'}\n"
        f"  serve it    lightship serve {directory / 'checkpoint'} --tp {staged.tensor_parallel}\n"
        f"  MLflow      {tracking}"
    )


def subjects_table(comparison: Comparison) -> Table:
    """Each subject's paired loss, those that look worst first."""
    table = _table("subject", "questions", "lost", "gained", "loss, points (95 % for all)", "p", "p, Holm")
    for s in sorted(comparison.subjects, key=lambda s: (s.p_value, s.subject)):
        table.add_row(
            escape(s.subject),
            f"{s.questions:,}",
            str(s.lost),
            str(s.gained),
            f"{100 * s.loss:+.1f} ({100 * s.loss_low:+.1f} to {100 * s.loss_high:+.1f})",
            f"{s.p_value:.2g}",
            f"{s.p_adjusted:.2g}",
        )
    return table


def rules_table(verdict: Verdict) -> Table:
    """Each rule of the gate and its reason."""
    table = _table("gate", "", "value", "limit", "why")
    for rule in verdict.rules:
        name = rule.rule if rule.against == "limit" else f"{rule.rule}, {rule.against}"
        value = f"{rule.value} ({rule.interval})" if rule.interval else rule.value
        decision = f"[{COLOURS[rule.decision]}]{rule.decision}[/]"
        table.add_row(name, decision, escape(value), escape(rule.limit), escape(rule.explanation))
    return table
