"""The report's section on speed: curves against load, and every figure in a table."""

from collections.abc import Sequence
from html import escape

from lightship.eval import plots
from lightship.eval.drawing import significant
from lightship.eval.report_parts import percent
from lightship.records import Figures, LoadReport, Percentiles, Throughput

HEADS = (
    "Requests",
    "Errors",
    "Queries/min",
    "Tokens/s",
    "First token, ms<br>p50 / p90 / p99",
    "Per output token, ms<br>p50 / p90 / p99",
)


def speed(throughput: Throughput) -> str:
    """Throughput and latencies against the requests in flight, and under arrivals by rate or trace if any."""
    latency = ("p50", "p99")
    panels = (
        plots.against_load("Queries per minute", throughput, "queries_per_minute"),
        plots.against_load("Time to first token, ms", throughput, "time_to_first_token_ms", latency),
        plots.against_load("Time per output token, ms", throughput, "time_per_output_token_ms", latency),
    )
    loads = sorted(throughput.loads, key=lambda x: (x.concurrency, x.server != "source"))
    rows = [(f"{load.server}, {load.concurrency} in flight", load) for load in loads]
    return (
        f"<h2>Speed</h2><p>{throughput.prompt_tokens:,} prompt tokens and {throughput.output_tokens:,} output tokens a "
        f"request, the two servers measured in turns on {escape(throughput.machine)}.</p>"
        f'<figure><div class="panels">{"".join(f"<div>{panel}</div>" for panel in panels)}</div><figcaption>'
        f"{_swatch('source')} source, {_swatch('quantized')} quantized; of latencies the median solid, the 99th "
        "percentile dashed. Measured on the machine named above and valid for it only: the local engine expands the "
        "weights on a CPU, and its speed says nothing about a GPU's.</figcaption></figure>"
        + _table("Server", rows)
        + "".join(_arrivals(report) for report in throughput.arrivals)
    )


def _swatch(css: str) -> str:
    return f'<svg class="swatch" viewBox="0 0 9 9"><rect width="9" height="9" class="{css}"/></svg>'


def _arrivals(report: LoadReport) -> str:
    rows = [
        (served.server + (f", {percent(served.goodput.share)} in time" if served.goodput else ""), served)
        for served in report.servers
    ]
    return f"<h3>{escape(report.workload.name)}</h3>{_table('Server', rows)}"


def _table(head: str, rows: Sequence[tuple[str, Figures]]) -> str:
    heads = f"<tr><th>{head}</th>{''.join(f'<th class=num>{name}</th>' for name in HEADS)}</tr>"
    return f'<div class="scroll"><table>{heads}{"".join(_row(name, figures) for name, figures in rows)}</table></div>'


def _row(name: str, figures: Figures) -> str:
    cells = (
        f"{figures.requests:,}",
        f"{figures.errors:,}",
        significant(figures.queries_per_minute),
        significant(figures.output_tokens_per_second),
        _latency(figures.time_to_first_token_ms),
        _latency(figures.time_per_output_token_ms),
    )
    return f"<tr><td>{escape(name)}</td>{''.join(f'<td class=num>{cell}</td>' for cell in cells)}</tr>"


def _latency(of: Percentiles) -> str:
    return " / ".join(significant(value) for value in (of.p50, of.p90, of.p99))
