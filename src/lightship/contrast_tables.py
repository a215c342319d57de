"""Releases side by side on the terminal, from 80 columns on.

lightship compare 3f2a champion
"""

from itertools import groupby

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lightship.contrast import Contrast, MetricContrast, ReleaseSide
from lightship.records import Comparison
from lightship.summary import size
from lightship.tables import COLOURS, subjects_table

MARKS = {"better": "[green]better[/]", "worse": "[red]worse[/]", "same": "[dim]same[/]", "other": ""}
MISSING = "[dim]-[/]"


def contrast_view(held: Contrast) -> RenderableType:
    """Two releases: who they are, their answers in pairs, the settings that differ, every metric."""
    parts: list[RenderableType] = [_heads(held), "", *_answers(held), _settings(held), "", _metrics(held)]
    if held.answers and held.answers.subjects:
        parts += ["", subjects_table(held.answers)]
    return Group(*parts)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=False, justify="left" if number == 0 else "right")
    return table


def _heads(held: Contrast) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("", "release", "made", "verdict", "champion"):
        table.add_column(column, overflow="fold")
    for letter, side in (("A", held.first), ("B", held.second)):
        table.add_row(f"[bold]{letter}[/]", side.release_id, _made(side), _verdict(side), _promoted(side))
    return table


def _made(side: ReleaseSide) -> str:
    return side.created[:16].replace("T", " ")


def _verdict(side: ReleaseSide) -> str:
    return f"[{COLOURS[side.verdict]}]{side.verdict}[/]" if side.verdict in COLOURS else escape(side.verdict)


def _promoted(side: ReleaseSide) -> str:
    if side.promoted == "champion":
        return "[bold]now[/]"
    return MISSING if side.promoted == "no" else f"was, as version {escape(side.promoted)}"


def _answers(held: Contrast) -> list[RenderableType]:
    if held.answers is None:
        return [Text(f"answers are not paired: {held.not_paired}"), ""] if held.not_paired else []
    return [Text.from_markup(answers_sentence(held.answers)), ""]


def answers_sentence(answers: Comparison) -> str:
    """What B's answers are against A's, with the interval and what it shows."""
    low, high = -answers.loss_high, -answers.loss_low
    said = "[red]B is worse[/]" if high < 0 else "[green]B is better[/]" if low > 0 else "no difference is shown"
    return (
        f"answers in pairs: A {answers.source_accuracy:.1%}, B {answers.quantized_accuracy:.1%} of "
        f"{answers.questions:,} questions; B - A {_points(-answers.loss)} points, 95 % from {_points(low)} to "
        f"{_points(high)}; {len(answers.lost)} lost, {len(answers.gained)} gained, p = {answers.p_value:.2g}: {said}"
    )


def _points(fraction: float) -> str:
    return f"{100 * fraction:+.2f}"


def _settings(held: Contrast) -> RenderableType:
    if not held.settings:
        return Text("no setting differs")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("setting that differs", "A", "B"):
        table.add_column(column, overflow="fold")
    for setting in held.settings:
        values = [MISSING if value is None else escape(value) for value in (setting.first, setting.second)]
        table.add_row(escape(setting.name), *values)
    return table


def _metrics(held: Contrast) -> Table:
    table = _table("metric", "A", "B", "B - A", "B is")
    alone = [m for m in held.metrics if "/" not in m.name]
    grouped = [m for m in held.metrics if "/" in m.name]
    for metric in alone:
        table.add_row(escape(metric.name), *_values(metric))
    for group, metrics in groupby(grouped, key=lambda m: m.name.partition("/")[0]):
        table.add_row(f"[bold]{escape(group)}[/]")
        for metric in metrics:
            table.add_row(f" {escape(metric.name.partition('/')[2])}", *_values(metric))
    table.caption = "Better and worse: the direction alone. What is more than chance, the answers' interval says."
    table.caption_justify = "left"
    return table


def _values(metric: MetricContrast) -> tuple[str, str, str, str]:
    first, second = (MISSING if value is None else number(value) for value in (metric.first, metric.second))
    difference = MISSING
    if metric.difference is not None:
        difference = "0" if metric.difference == 0 else number(metric.difference, signed=True)
    return first, second, difference, MARKS[metric.direction]


def number(value: float, signed: bool = False) -> str:
    """Four significant digits, three of a difference; `71.92M` from a million on."""
    sign, digits = ("+", 3) if signed else ("", 4)
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= unit:
            return f"{value / unit:{sign}.{digits}g}{letter}"
    return f"{value:{sign},.0f}" if abs(value) >= 1000 else f"{value:{sign}.{digits}g}"


def releases_table(sides: list[ReleaseSide]) -> Table:
    """Many releases, one a row, the newest first."""
    table = _table("release", "made", "rounding", "loss, points", "KL", "size", "speed", "verdict")
    for side in sorted(sides, key=lambda side: side.created, reverse=True):
        m = side.metrics
        ratios = [(int(k.rpartition("/c")[2]), v) for k, v in m.items() if k.startswith("throughput/ratio/c")]
        table.add_row(
            side.release_id,
            side.created[:10],
            escape(side.settings.get("quantization.method", "-")),
            f"{100 * m['accuracy_loss']:+.2f}" if "accuracy_loss" in m else MISSING,
            f"{m['fidelity/kl']:.4f}" if "fidelity/kl" in m else MISSING,
            size(m["size/bytes_after"]) if "size/bytes_after" in m else MISSING,
            f"{max(ratios)[1]:.2f}x" if ratios else MISSING,
            _verdict(side) + (" [bold]*[/]" if side.promoted == "champion" else ""),
        )
    table.caption = "* champion; speed is queries a minute over the source's, at the highest concurrency"
    table.caption_justify = "left"
    return table
