"""The report's plots as inline SVG: numbers in, markup out.

Colours are classes of `report_style`, so they follow the reader's light or dark theme.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby

from lightship.eval import drawing as draw
from lightship.eval.drawing import LABELS, WIDTH, human_bytes, short_layer
from lightship.records import Accuracy, Calibration, Fidelity, Plan, Throughput

SHARES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
"""Upper edges of the heat map's steps, as multiples of a layer's even share."""
SHARE_NAMES = ("≤ ⅛", "≤ ¼", "≤ ½", "≤ 1", "≤ 2", "≤ 4", "> 4")
ERRORS = (("first", "gate and up projections (w13)"), ("second", "down projection (w2)"))
Series = Mapping[str, Sequence[tuple[str, float]]]
"""Class of the colour -> layer's name and value."""


def bytes_by_part(plan: Plan, width: int = WIDTH) -> str:
    """Two bars a part of the model, before and after, the heaviest part first."""
    parts: dict[str, tuple[int, int]] = {}
    for tensor in plan.tensors:
        before, after = parts.get(tensor.part, (0, 0))
        parts[tensor.part] = (before + tensor.bytes_before, after + tensor.bytes_after)
    rows = [("all", (plan.bytes_before, plan.bytes_after))]
    rows += sorted(parts.items(), key=lambda part: -part[1][0])
    left, right, row = LABELS, width - 130, 38
    x_of = draw.scale(max(max(sizes) for _, sizes in rows), left, right)
    marks = [draw.legend((("source", "source"), ("quantized", "quantized")), 14, x=left)]
    for number, (part, (before, after)) in enumerate(rows):
        y = 28 + row * number + (6 if number else 0)
        marks.append(draw.text(left - 12, y + 18, part, "strong", "end"))
        for css, offset, size in (("source", 3, before), ("quantized", 15, after)):
            marks.append(draw.rect(left, y + offset, max(x_of(size) - left, 1), 10, css))
        said = human_bytes(before) if before == after else f"{human_bytes(before)} → {human_bytes(after)}"
        marks.append(draw.text(x_of(max(before, after)) + 10, y + 18, said, "strong"))
    return draw.svg(38 + row * len(rows), marks, "Bytes of the checkpoint by part, before and after", width)


def accuracy_by_category(source: Accuracy, quantized: Accuracy, width: int = WIDTH) -> str:
    """Two dots a category with their 95 % Wilson intervals; the axis spans the intervals, in whole tens of percent."""
    before, after = source.by_category(), quantized.by_category()
    left, right, row = LABELS + 30, width - 20, 34
    bottom = 40 + row * len(before)
    intervals = [wilson_interval(*counts) for counts in (*before.values(), *after.values())]
    lowest = 10 * math.floor(10 * min(low for low, _ in intervals))
    highest = 10 * math.ceil(10 * max(high for _, high in intervals))
    x_of = draw.scale(highest / 100, left, right, lowest / 100)
    most = width // 90
    tick_every = next(n for n in (5, 10, 20, 50) if (highest - lowest) / n <= most)
    marks = [draw.legend((("source", "source"), ("quantized", "quantized")), 14, x=left)]
    for percent in range(lowest, highest + 1, tick_every):
        marks.append(draw.line(x_of(percent / 100), 28, x_of(percent / 100), bottom, "grid"))
        marks.append(draw.text(x_of(percent / 100), bottom + 18, f"{percent} %", anchor="middle"))
    for i, category in enumerate(before):
        y = 40 + row * i + row / 2
        marks.append(draw.text(left - 14, y + 4, f"{category} ({before[category][1]})", "strong", "end"))
        for css, offset, (correct, asked) in (("source", -6, before[category]), ("quantized", 6, after[category])):
            low, high = wilson_interval(correct, asked)
            marks.append(draw.line(x_of(low), y + offset, x_of(high), y + offset, f"{css}-line", 2))
            said = f"{css}: {correct} of {asked}, {correct / asked:.1%} ({low:.1%} to {high:.1%})"
            marks.append(draw.dot(x_of(correct / asked), y + offset, css, said, 4.5))
    marks.append(
        draw.text((left + right) / 2, bottom + 40, "questions answered correctly, 95 % interval", anchor="middle")
    )
    return draw.svg(bottom + 50, marks, "Accuracy by category, source and quantized model", width)


def coverage(calibration: Calibration, width: int = WIDTH) -> str:
    """Heat map, a row a layer and a column an expert: tokens routed to it, as a multiple of the layer's even share.

    Experts below the calibration's floor have colours of their own.
    """
    layers, experts = len(calibration.layers), len(calibration.layers[0].tokens_of_experts())
    wide = width == WIDTH
    left, top = LABELS if wide else 64, 58 if calibration.starved else 34
    row = max(7, min(28, 400 // layers))
    column = (width - left - 10) / experts
    shares = [(f"h{i}", name) for i, name in enumerate(SHARE_NAMES, start=1)]
    starved = [("h0", "no token")] if calibration.without_tokens else []
    if len(calibration.starved) > len(calibration.without_tokens):
        starved.append(("starved", f"fewer than {calibration.token_floor:,} tokens: starved"))
    marks = [draw.legend(shares, 14, x=left, step=72 if wide else 48), draw.legend(starved, 36, x=left)]
    label_every = math.ceil(14 / row)
    for i in range(0, layers, label_every):
        name = short_layer(calibration.layers[i].layer_name)
        marks.append(draw.text(left - 12, top + (i + 0.5) * row + 4, name, anchor="end"))
    gap = 1 if column > 5 and row > 5 else 0
    placed = f"translate({left} {top}) scale({column:.4f} {row})"
    marks.append(f'<g transform="{placed}">{_cells(calibration, gap / column, gap / row)}</g>')
    bottom = top + row * layers
    tick = max(1, 2 ** math.ceil(math.log2(experts / (width // 52))))
    marks += [
        draw.text(left + (expert + 0.5) * column, bottom + 16, str(expert), anchor="middle")
        for expert in range(0, experts, tick)
    ]
    marks.append(draw.text(left + experts * column / 2, bottom + 36, "expert", anchor="middle"))
    return draw.svg(bottom + 44, marks, "Calibration tokens an expert, by layer", width)


def _cells(calibration: Calibration, gap_x: float, gap_y: float) -> str:
    """Unit squares less the gaps, as one path a colour; without gaps, neighbours of a colour are one rectangle."""
    cells: dict[str, list[str]] = {}
    tall = f"{1 - gap_y:.3g}"
    for y, layer in enumerate(calibration.layers):
        tokens = layer.tokens_of_experts()
        colours = [_colour(count, sum(tokens) / len(tokens), calibration.token_floor) for count in tokens]
        x = 0
        for colour, alike in groupby(colours):
            run = len(list(alike))
            width = 1 if gap_x else run
            side = f"{width - gap_x:.3g}"
            drawn = [f"M{x + i} {y}h{side}v{tall}h-{side}z" for i in range(0, run, width)]
            cells.setdefault(colour, []).extend(drawn)
            x += run
    return "".join(f'<path class="{css}" d="{"".join(drawn)}"/>' for css, drawn in cells.items())


def _colour(count: int, even: float, floor: int) -> str:
    if count < floor:
        return "starved" if count else "h0"
    return f"h{1 + sum(count / even > edge for edge in SHARES)}"


def errors_by_layer(series: Series, what: str, width: int = WIDTH) -> str:
    """Relative squared error of each layer after rounding, in percent; of w13 in `first`, of w2 in `second`."""
    left, right, top, bottom = 60, width - 10, 34, 194
    layers = [name for name, _ in next(iter(series.values()))]
    ticks = draw.round_ticks(max(100 * max(value for _, value in points) for points in series.values()))
    y_of, x_of = draw.scale(ticks[-1], bottom, top), draw.scale(len(layers), left, right)
    marks = [draw.text(0, 14, "error"), draw.legend(ERRORS, 14, x=left, step=208)]
    for tick in ticks:
        marks.append(draw.line(left, y_of(tick), right, y_of(tick), "grid"))
        marks.append(draw.text(left - 10, y_of(tick) + 4, f"{tick:g} %", anchor="end"))
    for css, points in series.items():
        placed = [(x_of(i + 0.5), y_of(100 * value)) for i, (_, value) in enumerate(points)]
        marks.append(draw.path_through(placed, f"{css}-line"))
        for (x, y), (name, value) in zip(placed, points, strict=True):
            marks.append(draw.dot(x, y, css, f"{short_layer(name)}: {value:.3%}", 3.5))
    for i in range(0, len(layers), math.ceil(len(layers) / (width // 52))):
        number = short_layer(layers[i]).removeprefix("layer ")
        marks.append(draw.text(x_of(i + 0.5), bottom + 18, number, anchor="middle"))
    marks.append(draw.text((left + right) / 2, bottom + 38, "layer", anchor="middle"))
    return draw.svg(bottom + 46, marks, what, width)


def kl_by_scene(fidelity: Fidelity, width: int = WIDTH) -> str:
    """A bar a scene: mean KL divergence a token in nats, with the agreement of the most likely token."""
    left, right, row = LABELS, width - 110, 34
    bottom = 8 + row * len(fidelity.scenes)
    ticks = draw.round_ticks(max(max(s.kl for s in fidelity.scenes), 1e-6))
    x_of = draw.scale(ticks[-1], left, right)
    marks = []
    for tick in ticks[:: 1 if width == WIDTH else 2]:
        marks += [
            draw.line(x_of(tick), 4, x_of(tick), bottom, "grid"),
            draw.text(x_of(tick), bottom + 18, f"{tick:g}", anchor="middle"),
        ]
    for i, scene in enumerate(fidelity.scenes):
        y = 8 + row * i
        marks.append(draw.text(left - 12, y + row / 2 + 4, scene.scene, "strong", "end"))
        marks.append(draw.rect(left, y + 7, x_of(scene.kl) - left, row - 14, "quantized"))
        said = f"{scene.kl:.4f}; {100 * scene.top1_agreement:.1f} %"
        marks.append(draw.text(x_of(scene.kl) + 8, y + row / 2 + 4, said, "strong"))
    marks.append(draw.text((left + right) / 2, bottom + 38, "KL(source ‖ quantized), nats a token", anchor="middle"))
    return draw.svg(bottom + 46, marks, "KL divergence by scene", width)


KL_LEVELS = 6
"""Colours of the divergence by layer."""


def kl_by_layer(fidelity: Fidelity, width: int = WIDTH) -> str:
    """Heat map, a row a scene and a column a layer: mean KL a token of what the layer's output predicts."""
    scenes = fidelity.scenes
    layers = len(scenes[0].kl_by_layer)
    left, top, row = LABELS if width == WIDTH else 96, 34, 26
    column = (width - left - 10) / layers
    edges = draw.round_ticks(max(max(max(s.kl_by_layer) for s in scenes), 1e-6))
    step = edges[-1] / KL_LEVELS
    levels = [(f"h{i + 1}", f"≤ {draw.significant(step * (i + 1))}") for i in range(KL_LEVELS)]
    marks = [draw.legend(levels, 14, x=left, step=(width - left) / KL_LEVELS)]
    for y, scene in enumerate(scenes):
        marks.append(draw.text(left - 12, top + row * (y + 0.5) + 4, scene.scene, anchor="end"))
        for x, kl in enumerate(scene.kl_by_layer):
            level = min(KL_LEVELS, 1 + int(kl / step))
            cell = draw.rect(left + column * x, top + row * y, column - min(1, column / 5), row - 1, f"h{level}")
            marks.append(f"<g><title>{escape(scene.scene)}, layer {x}: {kl:.4f} nats</title>{cell}</g>")
    bottom = top + row * len(scenes)
    tick = max(1, 2 ** math.ceil(math.log2(max(1, layers / (width // 52)))))
    marks += [
        draw.text(left + column * (x + 0.5), bottom + 16, str(x), anchor="middle") for x in range(0, layers, tick)
    ]
    marks.append(draw.text(left + column * layers / 2, bottom + 36, "layer", anchor="middle"))
    return draw.svg(bottom + 44, marks, "KL divergence by layer and scene", width)


def against_load(title: str, throughput: Throughput, measure: str, percentiles: Sequence[str] = ()) -> str:
    """A panel: a measure of both servers against the requests in flight, which double at equal steps.

    Args:
        measure: a field of `Load`.
        percentiles: those to draw where it is a latency, the first solid and the others dashed.
    """
    width, left, right, top, bottom = 270, 46, 256, 34, 190
    lines = []
    for server in ("source", "quantized"):
        loads = [throughput.load(server, c) for c in throughput.concurrencies]
        for number, percentile in enumerate(percentiles or ("",)):
            values = [getattr(getattr(x, measure), percentile) if percentile else getattr(x, measure) for x in loads]
            lines.append((server, percentile, number > 0, values))
    ticks = draw.round_ticks(max(max(values) for *_, values in lines))
    y_of = draw.scale(ticks[-1], bottom, top)
    places = [math.log2(c) for c in throughput.concurrencies]
    margin = 14 if len(places) > 1 else (right - left) / 2
    span = (places[-1] - places[0]) or 1.0
    x_at = [left + margin + (right - left - 2 * margin) * (place - places[0]) / span for place in places]
    marks = [draw.text(0, 14, title, "strong")]
    for tick in ticks:
        marks.append(draw.line(left, y_of(tick), right, y_of(tick), "grid"))
        marks.append(draw.text(left - 8, y_of(tick) + 4, f"{tick:,g}", anchor="end"))
    for server, percentile, dashed, values in lines:
        points = [(x, y_of(value)) for x, value in zip(x_at, values, strict=True)]
        marks.append(draw.path_through(points, f"{server}-line", 1.2 if dashed else 2, dashed))
        for (x, y), value, c in zip(points, values, throughput.concurrencies, strict=True):
            said = f"{server} {percentile}, {c} in flight: {draw.significant(value)}"
            marks.append(draw.dot(x, y, server, said, 2.5 if dashed else 4))
    for x, c in zip(x_at, throughput.concurrencies, strict=True):
        marks.append(draw.text(x, bottom + 18, str(c), anchor="middle"))
    marks.append(draw.text((left + right) / 2, bottom + 38, "requests in flight", anchor="middle"))
    return draw.svg(bottom + 46, marks, f"{title} against load", width)


def wilson_interval(correct: int, asked: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927)."""
    p = correct / asked
    middle = (p + z * z / (2 * asked)) / (1 + z * z / asked)
    half = z / (1 + z * z / asked) * math.sqrt(p * (1 - p) / asked + z * z / (4 * asked * asked))
    return max(0.0, middle - half), min(1.0, middle + half)
