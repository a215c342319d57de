"""The tables and the plot of a result of `moe_kernel`: benchmarks/moe_kernel.md, docs/moe_kernel.svg and docs/moe.md.

python -m benchmarks.moe_kernel_render benchmarks/moe_kernel.json
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightship.files import write_text

ROOT = Path(__file__).parents[1]
SHAPES = {"tp8": "TP-8 (256 experts, I = 256)", "ep8": "EP-8 (32 of 256 experts, I = 2048)"}
ENGINES = {
    "lightship": "lightship W4AFP8",
    "sglang W4AFP8": "SGLang W4AFP8",
    "sglang FP8": "SGLang FP8",
    "sglang FP8 tuned": "SGLang FP8, tuned",
}
PROVENANCE = ("command", "device", "driver", "date", "lightship", "torch", "triton", "sglang")
"""What a result must say of itself."""
GOAL_TOKENS = (1, 16, 64, 256, 1024, 4096)
"""The sizes that goals are set at."""
GOALS_US = {1: 35, 16: 140, 4096: 900}
GOAL_OVER_FLOOR, GOAL_MEAN = 1.25, 1.7
INK, FAINT, PAPER = "#1f2328", "#d0d7de", "#fffffe"
COLOURS = {"lightship": "#1a7f5a", "sglang W4AFP8": "#d9622b", "sglang FP8": "#8a8fc4", "sglang FP8 tuned": "#4a5fc4"}
DARK = {
    INK: "#e6edf3",
    FAINT: "#3d444d",
    PAPER: "#0d1117",
    "#1a7f5a": "#34c98f",
    "#d9622b": "#f0883e",
    "#8a8fc4": "#7d83b0",
    "#4a5fc4": "#8fa2ff",
}
"""The plot's colours on a light page, and those that take their places on a dark one."""
START, END = "<!-- written by benchmarks.moe_kernel_render -->", "<!-- end -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="what moe_kernel wrote")
    render(parser.parse_args().result)


def render(result: Path) -> None:
    """Write all three from the JSON file; of docs/moe.md the part between the marks."""
    found = json.loads(result.read_text())
    rows = found["rows"]
    text = "\n\n".join([provenance(found), goals(rows), speed(rows), means(rows), steps(rows), accuracy(rows)]) + "\n"
    write_text(ROOT / "benchmarks" / "moe_kernel.md", "# The fused W4AFP8 MoE layer beside SGLang's\n\n" + text)
    plot(found, ROOT / "docs" / "moe_kernel.svg")
    page = ROOT / "docs" / "moe.md"
    before, rest = page.read_text().split(START)
    write_text(page, f"{before}{START}\n\n{text}\n{END}{rest.split(END)[1]}")


def provenance(found: dict[str, Any]) -> str:
    """What was run, where and when, in one paragraph."""
    versions = f"torch {found['torch']}, triton {found['triton']}, SGLang {found['sglang'] or 'absent'}"
    lacks = [name for name in PROVENANCE if name not in found]
    return (
        f"`{found['command']}`, {found['device']}, {versions}, {found['date']}.\n"
        + (f"The file does not say: {', '.join(lacks)}.\n" if lacks else "")
        + "Microseconds of the whole layer, medians over CUDA graphs. Floor: the touched experts' bytes at 3 TB/s.\n"
        "Tuned FP8 is the fastest of up to 12 configurations; a ratio above 1 means that lightship is faster."
    )


def goals(rows: list[dict[str, Any]]) -> str:
    """What was to be reached, what was, and whether that is enough."""
    lines = [["goal", "measured", ""]]
    lines += [[what, measured, "met" if met else "**missed**"] for what, measured, met in _goals(rows)]
    return table(lines)


def _goals(rows: list[dict[str, Any]]) -> Iterator[tuple[str, str, bool]]:
    tp = {tokens: us for tokens, us in times(rows, "tp8").items() if tokens in GOAL_TOKENS}
    for shape in SHAPES:
        for name, column in (("SGLang's W4AFP8", 0), ("SGLang's faster FP8", 1)):
            found = {tokens: ratios(us)[column] for tokens, us in times(rows, shape).items()}
            known = {tokens: ratio for tokens, ratio in found.items() if ratio}
            if known:
                least, most = min(known, key=lambda t: known[t]), max(known, key=lambda t: known[t])
                measured = f"{known[least]:.2f}x (at {least}) to {known[most]:.2f}x (at {most})"
                what = f"{shape_name(shape)}: faster than {name} at every number of tokens"
                yield what, measured, known[least] > 1 and len(known) == len(found)
    mean = geometric_mean(tuple(ratios(us)[0] for us in tp.values()))
    if mean:
        what = f"TP-8: geometric mean over SGLang's W4AFP8 at {', '.join(map(str, tp))} tokens at least {GOAL_MEAN}x"
        yield what, f"{mean:.2f}x", mean >= GOAL_MEAN
    for tokens in (t for t in (64, 256) if t in tp):
        over = tp[tokens]["lightship"] / floors(rows, "tp8")[tokens]
        yield f"TP-8: {tokens} tokens within {GOAL_OVER_FLOOR}x of the floor", f"{over:.2f}x", over <= GOAL_OVER_FLOOR
    for tokens, most in GOALS_US.items():
        if tokens in tp:
            us = tp[tokens]["lightship"]
            yield f"TP-8: {tokens} token{'s' * (tokens > 1)} under {most} us", f"{us:.1f} us", us < most
    for shape in SHAPES:
        error = {r["engine"]: 100 * r["relative_error"] for r in rows if r["shape"] == shape and "relative_error" in r}
        theirs = error.get("sglang W4AFP8")
        for kind in ("dynamic", "static"):
            ours = error.get(f"lightship {kind}")
            if ours and theirs:
                what = f"{shape_name(shape)}: error, {kind} scales, no larger than SGLang's W4AFP8"
                yield what, f"{ours:.3f} %, SGLang {theirs:.3f} %", ours <= theirs


def speed(rows: list[dict[str, Any]]) -> str:
    """Times of all engines, and their ratios to ours."""
    head = ["shard", "tokens", "floor", "lightship", "over floor", *list(ENGINES.values())[1:]]
    lines = [[*head, "over SGLang W4AFP8", "over the faster FP8"]]
    for shape in SHAPES:
        for tokens, us in times(rows, shape).items():
            row = next(r for r in rows if (r["shape"], r["M"], r["engine"]) == (shape, tokens, "lightship"))
            cells = [shape_name(shape), str(tokens), f"{row['floor_us']:.0f}", f"{row['us']:.1f}"]
            cells += [f"{row['over_floor']:.2f}", *(number(us.get(name)) for name in list(ENGINES)[1:])]
            lines.append([*cells, *(number(ratio, 2) for ratio in ratios(us))])
    return table(lines)


def means(rows: list[dict[str, Any]]) -> str:
    """Geometric means of the ratios, at the sizes that goals are set at and at all."""
    lines = [["geometric mean", "at tokens", "over SGLang W4AFP8", "over the faster FP8"]]
    for shape, name in SHAPES.items():
        measured = times(rows, shape)
        for sizes in ([t for t in measured if t in GOAL_TOKENS], list(measured)):
            found = [ratios(measured[tokens]) for tokens in sizes]
            columns = (number(geometric_mean(column), 2) for column in zip(*found, strict=True))
            lines.append([name, ", ".join(map(str, sizes)), *columns])
    return table([line for line in lines if len(line) == 4])


def steps(rows: list[dict[str, Any]]) -> str:
    """Where our time goes; each step alone."""
    lines = [["shard", "tokens", "quantize and route", "gate_up", "down and combine"]]
    for row in rows:
        if row["engine"] == "lightship, its steps" and "error" not in row:
            parts = (number(row[name]) for name in ("routing", "gate_up", "down_and_combine"))
            lines.append([shape_name(row["shape"]), str(row["M"]), *parts])
    return "Each step alone, microseconds:\n\n" + table(lines)


def accuracy(rows: list[dict[str, Any]]) -> str:
    """Relative errors."""
    lines = [["shard", "tokens", "engine", "relative error, %"]]
    for row in rows:
        if "relative_error" in row:
            error = f"{100 * row['relative_error']:.2f}"
            lines.append([shape_name(row["shape"]), str(row["M"]), row["engine"], error])
    return "Norm of the error over that of the result, against float32 with the same int4 weights:\n\n" + table(lines)


def times(rows: list[dict[str, Any]], shape: str) -> dict[int, dict[str, float]]:
    """Microseconds by number of tokens and engine; only sizes at which ours was measured."""
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        if row["shape"] == shape and row["engine"] in ENGINES and "us" in row:
            found.setdefault(row["M"], {})[row["engine"]] = row["us"]
    return {tokens: us for tokens, us in sorted(found.items()) if "lightship" in us}


def floors(rows: list[dict[str, Any]], shape: str) -> dict[int, float]:
    """The floor in microseconds by number of tokens."""
    return {r["M"]: r["floor_us"] for r in rows if r["shape"] == shape and "floor_us" in r}


def shape_name(shape: str) -> str:
    return shape.upper().replace("8", "-8")


def ratios(us: dict[str, float]) -> tuple[float | None, float | None]:
    """SGLang's W4AFP8 over ours, and its faster FP8 over ours."""
    fp8 = [us[name] for name in ("sglang FP8", "sglang FP8 tuned") if name in us]
    w4 = us.get("sglang W4AFP8")
    return (w4 / us["lightship"] if w4 else None), (min(fp8) / us["lightship"] if fp8 else None)


def geometric_mean(values: tuple[float | None, ...]) -> float | None:
    known = [value for value in values if value]
    return math.exp(sum(map(math.log, known)) / len(known)) if known else None


def number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def table(lines: list[list[str]]) -> str:
    """Markdown, the first line its head."""
    rows = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([rows[0], "|" + " --- |" * len(lines[0]), *rows[1:]])


def plot(found: dict[str, Any], out: Path) -> None:
    """Time over floor against the number of tokens, a panel a shard and a line an engine."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "moe_kernel", "font.size": 11, "axes.edgecolor": FAINT, "text.color": INK})
    mpl.rcParams.update({"axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "grid.color": FAINT})
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(SHAPES), figsize=(11, 4.6), sharey=True, layout="constrained")
    figure.set_facecolor(PAPER)
    for panel, shape in zip(panels, SHAPES, strict=True):
        _draw(panel, found["rows"], shape)
    panels[0].set_ylabel("time / floor")
    figure.suptitle(f"One MoE layer of DeepSeek-V3, {found['device']}, {found['date']}", fontsize=13)
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(lines[::-1], labels[::-1], loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(out, metadata={"Date": None})
    pyplot.close(figure)
    write_text(out, with_dark_page(out.read_text()))


def _draw(panel: Any, rows: list[dict[str, Any]], shape: str) -> None:
    measured, floor = times(rows, shape), floors(rows, shape)
    for (engine, label), marker in reversed(list(zip(ENGINES.items(), "os^v", strict=True))):
        points = [(tokens, us[engine] / floor[tokens]) for tokens, us in measured.items() if engine in us]
        ours = engine == "lightship"
        look = {"color": COLOURS[engine], "linestyle": ":" if engine == "sglang FP8" else "-"}
        if points:
            panel.plot(*zip(*points, strict=True), marker, label=label, linewidth=2.4 if ours else 1.6, **look)
        for (tokens, over), (_, after) in zip(points, [*points[1:], (0, math.inf)], strict=True) if ours else ():
            # Beside the line, which comes from above or goes up, and ends at the last.
            aside = (13, -14) if after == math.inf else (7, 8) if after < over else (-11, 8)
            panel.annotate(
                f"{over:.2f}", (tokens, over), aside, textcoords="offset points", ha="center", size=9.5,
                color=COLOURS[engine],
            )  # fmt: skip
    panel.axhline(1, color=INK, linewidth=1)
    panel.annotate(
        "floor: the touched int4 experts read once, at 3 TB/s",
        (0.98, 1),
        (0, -13),
        ("axes fraction", "data"),
        "offset points",
        ha="right",
        size=9.5,
    )
    panel.set(xlabel="tokens", xscale="log", yscale="log", ylim=(0.8, 11), facecolor=PAPER)
    panel.set_title(SHAPES[shape], fontsize=11.5)
    panel.set_xticks(list(measured), [str(tokens) for tokens in measured])
    panel.set_yticks([1, 2, 4, 8], ["1x", "2x", "4x", "8x"])
    panel.minorticks_off()
    panel.tick_params(length=0)
    panel.grid(linewidth=0.7)
    panel.spines[["top", "right", "left"]].set_visible(False)


def with_dark_page(svg: str) -> str:
    """The same picture, with other colours where the reader's page is dark."""
    rules = "".join(
        f'[style*="{part}: {light}"] {{ {part}: {dark} !important }} '
        for light, dark in DARK.items()
        for part in ("fill", "stroke")
    )
    style = f"<style>@media (prefers-color-scheme: dark) {{ {rules}}}</style>"
    return svg.replace("</metadata>", f"</metadata>{style}", 1)


if __name__ == "__main__":
    main()
