"""The report's plots as inline SVG: numbers in, markup out.

Colours are classes of `report_style`, so they follow the reader's light or dark theme.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape

from lightship.records import Accuracy, Calibration, Fidelity, LayerError, Plan

WIDTH = 860
LABELS = 130
"""Left margin of plots whose rows have names."""

BYTES_OF_ACTIONS = (
    ("int4", "first", "routed experts"),
    ("fp8", "second", "other linear layers, stay FP8"),
    ("keep", "kept", "embeddings, norms, router: untouched"),
)
SHARES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
"""Upper edges of the heat map's steps, as multiples of a layer's even share; class h1 is the first step, h0 is zero."""
SHARE_NAMES = ("none", "≤ ⅛", "≤ ¼", "≤ ½", "≤ 1", "≤ 2", "≤ 4", "> 4")


def bytes_before_after(plan: Plan) -> str:
    """Two stacked bars: where the checkpoint's bytes are before and after."""
    scale = (WIDTH - LABELS - 80) / plan.bytes_before
    marks = [_legend(((c, n) for _, c, n in BYTES_OF_ACTIONS), 14)]
    for y, name, after in ((36, "source", False), (84, "quantized", True)):
        marks.append(_text(LABELS - 12, y + 22, name, "strong", "end"))
        x = float(LABELS)
        for action, css, _ in BYTES_OF_ACTIONS:
            size = sum(t.bytes_after if after else t.bytes_before for t in plan.tensors if t.action == action)
            marks.append(_rect(x, y, size * scale, 34, css))
            if size * scale > 70:
                marks.append(_text(x + 10, y + 22, human_bytes(size), f"on-{css}"))
            x += size * scale
        marks.append(_text(x + 10, y + 22, human_bytes(plan.bytes_after if after else plan.bytes_before), "strong"))
    return _svg(128, marks, "Bytes of the checkpoint before and after, by what happens to them")


def accuracy_by_category(source: Accuracy, quantized: Accuracy) -> str:
    """Two dots a category with their 95 % Wilson intervals; the axis spans the intervals, in whole tens of percent."""
    before, after = source.by_category(), quantized.by_category()
    left, right, row = LABELS + 40, WIDTH - 20, 34
    bottom = 40 + row * len(before)
    intervals = [wilson_interval(*counts) for counts in (*before.values(), *after.values())]
    lowest = 10 * math.floor(10 * min(low for low, _ in intervals))
    highest = 10 * math.ceil(10 * max(high for _, high in intervals))
    x_of = _scale(highest / 100, left, right, lowest / 100)
    marks = [_legend((("source", "source"), ("quantized", "quantized")), 14, x=left)]
    for percent in range(lowest, highest + 1, 5 if highest - lowest <= 40 else 10):
        marks.append(_line(x_of(percent / 100), 28, x_of(percent / 100), bottom, "grid"))
        marks.append(_text(x_of(percent / 100), bottom + 18, f"{percent} %", anchor="middle"))
    for i, category in enumerate(before):
        y = 40 + row * i + row / 2
        marks.append(_text(left - 14, y + 4, f"{category} ({before[category][1]})", "strong", "end"))
        for css, offset, (correct, asked) in (("source", -6, before[category]), ("quantized", 6, after[category])):
            low, high = wilson_interval(correct, asked)
            marks.append(_line(x_of(low), y + offset, x_of(high), y + offset, f"{css}-line", 2))
            marks.append(f'<circle cx="{x_of(correct / asked):.1f}" cy="{y + offset:.1f}" r="4.5" class="{css}"/>')
    marks.append(_text((left + right) / 2, bottom + 40, "questions answered correctly, 95 % interval", anchor="middle"))
    return _svg(bottom + 50, marks, "Accuracy by category, source and quantized model")


def coverage(calibration: Calibration) -> str:
    """Heat map, a row a layer and a column an expert: tokens routed to it, as a multiple of the layer's even share."""
    experts = len(calibration.layers[0].tokens_of_experts())
    left, top = LABELS, 34
    row = max(7, min(28, 400 // len(calibration.layers)))
    column = (WIDTH - left - 10) / experts
    gap = 1 if column > 5 and row > 5 else 0
    steps: list[list[str]] = [[] for _ in SHARE_NAMES]
    marks = [_legend(((f"h{i}", n) for i, n in enumerate(SHARE_NAMES)), 14, x=left, step=72)]
    marks.append(_text(0, 14, "× an even share"))
    label_every = math.ceil(14 / row)
    for i, layer in enumerate(calibration.layers):
        y = top + i * row
        if i % label_every == 0:
            marks.append(_text(left - 12, y + row / 2 + 4, short_layer(layer.layer_name), anchor="end"))
        tokens = layer.tokens_of_experts()
        even = sum(tokens) / experts
        for expert, count in enumerate(tokens):
            step = 0 if count == 0 else 1 + sum(count / even > edge for edge in SHARES)
            x, w, h = left + expert * column, column - gap, row - gap
            steps[step].append(f"M{x:.1f} {y}h{w:.1f}v{h}h{-w:.1f}z")
    marks += [f'<path class="h{i}" d="{"".join(cells)}"/>' for i, cells in enumerate(steps) if cells]
    bottom = top + row * len(calibration.layers)
    tick = max(1, 2 ** math.ceil(math.log2(experts / 16)))
    for expert in range(0, experts, tick):
        marks.append(_text(left + (expert + 0.5) * column, bottom + 16, str(expert), anchor="middle"))
    marks.append(_text(left + experts * column / 2, bottom + 36, "expert", anchor="middle"))
    return _svg(bottom + 44, marks, "Calibration tokens an expert, by layer")


def errors_by_layer(layers: Sequence[LayerError]) -> str:
    """Relative squared error of a layer's w13 and w2 after rounding, in percent."""
    left, right, top, bottom = 70, WIDTH - 20, 34, 214
    ticks = _ticks(max(100 * max(e.w13, e.w2) for e in layers))
    y_of = _scale(ticks[-1], bottom, top)
    x_of = _scale(len(layers), left, right)
    marks = [
        _legend(
            (("first", "gate and up projections (w13)"), ("second", "down projection (w2)")), 14, x=left + 150, step=230
        )
    ]
    marks.append(_text(0, 14, "relative squared error"))
    for tick in ticks:
        marks += [
            _line(left, y_of(tick), right, y_of(tick), "grid"),
            _text(left - 10, y_of(tick) + 4, f"{tick:g} %", anchor="end"),
        ]
    for css, values in (("first", [e.w13 for e in layers]), ("second", [e.w2 for e in layers])):
        points = [(x_of(i + 0.5), y_of(100 * v)) for i, v in enumerate(values)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        marks.append(f'<polyline points="{path}" class="{css}-line" stroke-width="1.5"/>')
        marks += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" class="{css}"/>' for x, y in points]
    for i in range(0, len(layers), math.ceil(len(layers) / 16)):
        marks.append(
            _text(x_of(i + 0.5), bottom + 18, short_layer(layers[i].layer_name).removeprefix("layer "), anchor="middle")
        )
    marks.append(_text((left + right) / 2, bottom + 38, "layer", anchor="middle"))
    return _svg(bottom + 46, marks, "Relative squared error of the experts' weights, by layer")


def kl_by_scene(fidelity: Fidelity) -> str:
    """A bar a scene: mean KL divergence a token in nats, with the agreement of the most likely token."""
    left, right, row = LABELS, WIDTH - 210, 34
    bottom = 8 + row * len(fidelity.scenes)
    ticks = _ticks(max(max(s.kl for s in fidelity.scenes), 1e-6))
    x_of = _scale(ticks[-1], left, right)
    marks = []
    for tick in ticks:
        marks += [
            _line(x_of(tick), 4, x_of(tick), bottom, "grid"),
            _text(x_of(tick), bottom + 18, f"{tick:g}", anchor="middle"),
        ]
    for i, scene in enumerate(fidelity.scenes):
        y = 8 + row * i
        marks.append(_text(left - 12, y + row / 2 + 4, scene.scene, "strong", "end"))
        marks.append(_rect(left, y + 7, x_of(scene.kl) - left, row - 14, "quantized"))
        said = f"{scene.kl:.4f}; same top token {100 * scene.top1_agreement:.1f} %"
        marks.append(_text(x_of(scene.kl) + 8, y + row / 2 + 4, said, "strong"))
    marks.append(_text((left + right) / 2, bottom + 38, "KL(source ‖ quantized), nats a token", anchor="middle"))
    return _svg(bottom + 46, marks, "KL divergence by scene")


def columns(title: str, groups: Sequence[tuple[str, float, float]], axis: str) -> str:
    """A small panel: for each group a source and a quantized column, with their values on top."""
    width, left, top, bottom = 260, 44, 44, 190
    ticks = _ticks(max(max(source, quantized) for _, source, quantized in groups))
    y_of = _scale(ticks[-1], bottom, top)
    step = (width - left) / len(groups)
    bar = min(34.0, step * 0.42)
    marks = [_text(0, 14, title, "strong")]
    for tick in ticks:
        marks += [
            _line(left, y_of(tick), width, y_of(tick), "grid"),
            _text(left - 8, y_of(tick) + 4, f"{tick:g}", anchor="end"),
        ]
    for i, (name, source, quantized) in enumerate(groups):
        middle = left + step * (i + 0.5)
        for css, value, x in (("source", source, middle - bar - 1), ("quantized", quantized, middle + 1)):
            marks.append(_rect(x, y_of(value), bar, bottom - y_of(value), css))
            marks.append(_text(x + bar / 2, y_of(value) - 5, significant(value), "strong", "middle"))
        marks.append(_text(middle, bottom + 18, name, anchor="middle"))
    marks.append(_text((left + width) / 2, bottom + 38, axis, anchor="middle"))
    return _svg(bottom + 46, marks, title, width)


def wilson_interval(correct: int, asked: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927)."""
    p = correct / asked
    middle = (p + z * z / (2 * asked)) / (1 + z * z / asked)
    half = z / (1 + z * z / asked) * math.sqrt(p * (1 - p) / asked + z * z / (4 * asked * asked))
    return max(0.0, middle - half), min(1.0, middle + half)


def human_bytes(count: float) -> str:
    """`1.62 GB`: powers of 1,000, three significant digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{significant(count)} {unit}"
        count /= 1000
    return f"{significant(count)} TB"


def significant(value: float) -> str:
    """Three significant digits, with thousands separated: 1,240; 38.2; 0.0123."""
    if value == 0:
        return "0"
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{round(value, digits):,.{max(0, digits)}f}"


def short_layer(layer_name: str) -> str:
    """`model.layers.3.mlp` is `layer 3`."""
    return f"layer {next((part for part in layer_name.split('.') if part.isdigit()), layer_name)}"


def _scale(largest: float, start: float, end: float, smallest: float = 0.0) -> Callable[[float], float]:
    """Maps values from `smallest` to `largest` onto pixels from `start` to `end`."""
    return lambda value: start + (end - start) * (value - smallest) / (largest - smallest)


def _ticks(largest: float) -> list[float]:
    """Round numbers from 0 to at least `largest`, about four of them."""
    power = 10.0 ** math.floor(math.log10(largest / 4))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power * 4 >= largest * 0.999)
    return [float(f"{step * i:.6g}") for i in range(math.ceil(largest * 0.999 / step) + 1)]


def _legend(entries: Iterable[tuple[str, str]], y: float, x: float = LABELS, step: float | None = None) -> str:
    marks = []
    for css, name in entries:
        marks += [_rect(x, y - 9, 10, 10, css), _text(x + 16, y, name)]
        x += step or 46 + 6.4 * len(name)
    return "".join(marks)


def _svg(height: float, marks: Iterable[str], title: str, width: int = WIDTH) -> str:
    box = f'viewBox="0 0 {width} {height:.0f}"'
    return (
        f'<svg {box} role="img" aria-label="{escape(title)}" xmlns="http://www.w3.org/2000/svg">{"".join(marks)}</svg>'
    )


def _rect(x: float, y: float, width: float, height: float, css: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{max(height, 0):.1f}" class="{css}"/>'


def _line(x1: float, y1: float, x2: float, y2: float, css: str, width: float = 1) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}" stroke-width="{width}"/>'


def _text(x: float, y: float, text: str, css: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}" text-anchor="{anchor}">{escape(text)}</text>'
