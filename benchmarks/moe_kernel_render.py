"""The tables and the plot of a result of `moe_kernel`: benchmarks/moe_kernel.md, docs/moe_kernel.svg and docs/moe.md.

python -m benchmarks.moe_kernel_render benchmarks/moe_kernel.json
"""

import argparse
import json
import math
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
START, END = "<!-- written by benchmarks.moe_kernel_render -->", "<!-- end -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="what moe_kernel wrote")
    render(parser.parse_args().result)


def render(result: Path) -> None:
    """Write all three from the JSON file; of docs/moe.md the part between the marks."""
    found = json.loads(result.read_text())
    text = "\n\n".join([provenance(found), speed(found["rows"]), means(found["rows"]), steps(found["rows"])])
    text += "\n\n" + accuracy(found["rows"]) + "\n"
    write_text(ROOT / "benchmarks" / "moe_kernel.md", "# The fused W4AFP8 MoE layer beside SGLang's\n\n" + text)
    plot(found, ROOT / "docs" / "moe_kernel.svg")
    page = ROOT / "docs" / "moe.md"
    before, rest = page.read_text().split(START)
    write_text(page, f"{before}{START}\n\n{text}\n{END}{rest.split(END)[1]}")


def provenance(found: dict[str, Any]) -> str:
    """What was run, where and when, in one paragraph."""
    versions = f"torch {found['torch']}, triton {found['triton']}, SGLang {found['sglang'] or 'absent'}"
    return (
        f"`{found['command']}`, {found['device']}, {versions}, {found['date']}.\n"
        "Microseconds of the whole layer, medians over CUDA graphs; the floor: the touched experts' bytes at 3 TB/s.\n"
        "Tuned FP8 is the fastest of 12 configurations; a ratio above 1 means that lightship is faster."
    )


def speed(rows: list[dict[str, Any]]) -> str:
    """Times of all engines, and their ratios to ours."""
    head = ["shard", "tokens", "floor", "lightship", "over floor", *list(ENGINES.values())[1:]]
    lines = [[*head, "over SGLang W4AFP8", "over the faster FP8"]]
    for shape in SHAPES:
        for tokens, us in times(rows, shape).items():
            row = next(r for r in rows if (r["shape"], r["M"], r["engine"]) == (shape, tokens, "lightship"))
            cells = [shape.upper().replace("8", "-8"), str(tokens), f"{row['floor_us']:.0f}", f"{row['us']:.1f}"]
            cells += [f"{row['over_floor']:.2f}", *(number(us.get(name)) for name in list(ENGINES)[1:])]
            lines.append([*cells, *(number(ratio, 2) for ratio in ratios(us))])
    return table(lines)


def means(rows: list[dict[str, Any]]) -> str:
    """Geometric means of the ratios."""
    lines = [["geometric mean over all rows", "over SGLang W4AFP8", "over the faster FP8"]]
    for shape, name in SHAPES.items():
        found = [ratios(us) for us in times(rows, shape).values()]
        lines.append([name, *(number(geometric_mean(column), 2) for column in zip(*found, strict=True))])
    return table([line for line in lines if len(line) == 3])


def steps(rows: list[dict[str, Any]]) -> str:
    """Where our time goes; each step alone."""
    lines = [["shard", "tokens", "quantize and route", "gate_up", "down and combine"]]
    for row in rows:
        if row["engine"] == "lightship, its steps" and "error" not in row:
            parts = (number(row[name]) for name in ("routing", "gate_up", "down_and_combine"))
            lines.append([row["shape"].upper().replace("8", "-8"), str(row["M"]), *parts])
    return "Each step alone, microseconds:\n\n" + table(lines)


def accuracy(rows: list[dict[str, Any]]) -> str:
    """Relative errors."""
    lines = [["shard", "tokens", "engine", "relative error, %"]]
    for row in rows:
        if "relative_error" in row:
            name = row["shape"].upper().replace("8", "-8")
            lines.append([name, str(row["M"]), row["engine"], f"{100 * row['relative_error']:.2f}"])
    return "Norm of the error over that of the result, against float32 with the same int4 weights:\n\n" + table(lines)


def times(rows: list[dict[str, Any]], shape: str) -> dict[int, dict[str, float]]:
    """Microseconds by number of tokens and engine; only sizes at which ours was measured."""
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        if row["shape"] == shape and row["engine"] in ENGINES and "us" in row:
            found.setdefault(row["M"], {})[row["engine"]] = row["us"]
    return {tokens: us for tokens, us in sorted(found.items()) if "lightship" in us}


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
    mpl.rcParams["svg.hashsalt"] = "moe_kernel"
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(SHAPES), figsize=(11, 4.2), sharey=True, layout="constrained")
    rows = found["rows"]
    for panel, (shape, title) in zip(panels, SHAPES.items(), strict=True):
        measured = times(rows, shape)
        floor = {r["M"]: r["floor_us"] for r in rows if r["shape"] == shape and "floor_us" in r}
        for (engine, label), marker in zip(ENGINES.items(), "os^v", strict=True):
            points = [(tokens, us[engine] / floor[tokens]) for tokens, us in measured.items() if engine in us]
            if points:
                panel.plot(*zip(*points, strict=True), marker=marker, label=label)
        panel.axhline(1, color="grey", linewidth=0.8)
        panel.set(title=title, xlabel="tokens", xscale="log", yscale="log")
        panel.set_xticks(list(measured), [str(tokens) for tokens in measured])
        panel.minorticks_off()
        panel.set_yticks([1, 2, 4, 8], ["1", "2", "4", "8"])
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("time over the floor of 4-bit weights")
    panels[0].legend(frameon=False)
    figure.suptitle(f"One MoE layer of DeepSeek-V3, {found['device']}, {found['date']}")
    figure.savefig(out, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
