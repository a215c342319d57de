"""What the report's plots are drawn with: SVG marks as text, round numbers for axes, numbers for people."""

import math
from collections.abc import Callable, Iterable
from html import escape

WIDTH, NARROW = 860, 420
"""Of a drawing on a desk and on a phone, in pixels at which its text is read well."""
LABELS = 130
"""Left margin of plots whose rows have names."""


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


def scale(largest: float, start: float, end: float, smallest: float = 0.0) -> Callable[[float], float]:
    """Maps values from `smallest` to `largest` onto pixels from `start` to `end`."""
    return lambda value: start + (end - start) * (value - smallest) / (largest - smallest)


def round_ticks(largest: float) -> list[float]:
    """Round numbers from 0 to at least `largest`, about four of them."""
    power = 10.0 ** math.floor(math.log10(largest / 4))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power * 4 >= largest * 0.999)
    return [float(f"{step * i:.6g}") for i in range(math.ceil(largest * 0.999 / step) + 1)]


def legend(entries: Iterable[tuple[str, str]], y: float, x: float = LABELS, step: float | None = None) -> str:
    """Squares with names, one after the other."""
    marks = []
    for css, name in entries:
        marks += [rect(x, y - 9, 10, 10, css), text(x + 16, y, name)]
        x += step or 46 + 6.4 * len(name)
    return "".join(marks)


def svg(height: float, marks: Iterable[str], title: str, width: int = WIDTH) -> str:
    """A drawing that scales with the page."""
    box = f'viewBox="0 0 {width} {height:.0f}"'
    return (
        f'<svg {box} role="img" aria-label="{escape(title)}" xmlns="http://www.w3.org/2000/svg">{"".join(marks)}</svg>'
    )


def rect(x: float, y: float, width: float, height: float, css: str) -> str:
    """A rectangle."""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{max(height, 0):.1f}" class="{css}"/>'


def line(x1: float, y1: float, x2: float, y2: float, css: str, width: float = 1) -> str:
    """A straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}" stroke-width="{width}"/>'


def text(x: float, y: float, said: str, css: str = "", anchor: str = "start") -> str:
    """A text whose anchor is at a point."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}" text-anchor="{anchor}">{escape(said)}</text>'


def dot(x: float, y: float, css: str, said: str, radius: float = 4) -> str:
    """A point of a curve, which says its value where the pointer rests."""
    circle = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" class="{css}"/>'
    return f"<g><title>{escape(said)}</title>{circle}</g>"


def path_through(points: Iterable[tuple[float, float]], css: str, width: float = 1.5, dashed: bool = False) -> str:
    """A line through points."""
    through = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashes = ' stroke-dasharray="3 4"' if dashed else ""
    return f'<polyline points="{through}" class="{css}" stroke-width="{width}"{dashes}/>'
