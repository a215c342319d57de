"""Pieces of the report's markup, and how it writes numbers."""


def figure(title: str, svg: str, caption: str, narrow: str = "") -> str:
    """A titled drawing with what it means below it; `narrow` is the drawing for a phone."""
    drawn = f'<div class="on-wide">{svg}</div><div class="on-narrow">{narrow}</div>' if narrow else svg
    return f"<figure><h3>{title}</h3>{drawn}<figcaption>{caption}</figcaption></figure>"


def row(name: str, source: str, quantized: str, change: str) -> str:
    """A row of the summary."""
    return f"<tr><td>{name}</td>{''.join(f'<td class=num>{x}</td>' for x in (source, quantized, change))}</tr>"


def change(before: float, after: float) -> str:
    """A relative change, in percent."""
    return minus(f"{100 * (after / before - 1):+.1f} %")


def points(fraction: float) -> str:
    """A fraction as signed percentage points."""
    return minus(f"{100 * fraction:+.2f}")


def minus(number: str) -> str:
    """A number with a true minus sign."""
    return number.replace("-", "−")


def percent(fraction: float) -> str:
    """A fraction, in percent."""
    return f"{100 * fraction:.1f} %"
