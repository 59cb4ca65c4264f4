"""Line charts as inline SVG whose labels are HTML: sharp and readable at every width.

The SVG is stretched to its box and its strokes are not; text stands beside it as elements placed in
percent. Colours are classes of the page's style, so that a chart follows light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

MAX_POINTS = 400  # of one line: more cannot be seen
UNITS = 1000  # of the SVG's own square
Point = tuple[float, float]
Scale = Callable[[float], float]  # a step or value to the SVG's units


@dataclass(frozen=True)
class Series:
    """One line. color: 1 to 7, a class of the page's style."""

    name: str
    points: Sequence[Point]  # (step, value) in order of step, values finite
    color: int
    faint: bool = False  # thin, behind the others, its outliers cut off
    dots: bool = False  # a mark and a tooltip at each point


def line_chart(title: str, series: Sequence[Series], last_step: int, *, low: bool = False) -> str:
    """A figure with title, legend and axes; "" when no series has a point. low: less high, and from
    zero on, for what counts as an amount."""
    drawn = [one for one in series if one.points]
    if not drawn:
        return ""
    bottom, top = value_range(drawn)
    bottom = min(0.0, bottom) if low else bottom
    ticks = nice_ticks(bottom, top, 4)
    bottom, top = min(bottom, ticks[0]), max(top, ticks[-1])
    right = max(1, last_step)
    steps = [tick for tick in nice_ticks(0, right, 5) if tick <= right and tick == int(tick)]

    def x(step: float) -> float:
        return UNITS * step / right

    def y(value: float) -> float:
        return UNITS * (top - min(max(value, bottom), top)) / (top - bottom)

    grid = "".join(f'<path class="rule" d="M0 {y(tick):.1f}H{UNITS}"/>' for tick in ticks)
    lines = "".join(_line(one, x, y) for one in sorted(drawn, key=lambda one: not one.faint))
    labels = "".join(
        f'<span class="y" style="top:{y(tick) / UNITS:.2%}">{label}</span>'
        for tick, label in zip(ticks, tick_labels(ticks), strict=True)
    ) + "".join(
        f'<span class="x" style="left:{x(tick) / UNITS:.2%}">{int(tick):,}</span>' for tick in steps
    )
    kind = "plot low" if low else "plot"
    return (
        f'<figure class="chart"><figcaption>{escape(title)}{_legend(drawn)}</figcaption>'
        f'<div class="{kind}"><svg viewBox="0 0 {UNITS} {UNITS}" preserveAspectRatio="none" '
        f'role="img" aria-label="{escape(title)} over steps">{grid}{lines}</svg>{labels}</div>'
        "</figure>"
    )


def _legend(series: Sequence[Series]) -> str:
    if len(series) < 2:
        return ""
    keys = (
        f'<li><i class="c{one.color}{" faint" if one.faint else ""}"></i>{escape(one.name)}</li>'
        for one in series
    )
    return f"<ul>{''.join(keys)}</ul>"


def _line(series: Series, x: Scale, y: Scale) -> str:
    points = thinned(series.points, extremes=series.faint)
    path = "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in points)
    kind = f"c{series.color}{' faint' if series.faint else ''}"
    drawn = f'<path class="{kind}" d="M{path}"/>' if len(points) > 1 else ""
    if series.dots or len(points) == 1:
        for step, value in points:  # a line of no length has round ends: a dot at any stretch
            tip = f"{escape(series.name)}, step {int(step):,}: {number(value)}"
            drawn += (
                f'<path class="{kind} dot" d="M{x(step):.1f} {y(value):.1f}h0">'
                f"<title>{tip}</title></path>"
            )
    return drawn


def thinned(points: Sequence[Point], *, extremes: bool = False) -> list[Point]:
    """At most MAX_POINTS of a line: of equal stretches the last point, or the lowest and highest;
    always the first and the last of all."""
    if len(points) <= MAX_POINTS:
        return list(points)
    pieces = MAX_POINTS // 2 - 1 if extremes else MAX_POINTS - 2
    inner = points[1:-1]
    cuts = [len(inner) * piece // pieces for piece in range(pieces + 1)]
    kept = [points[0]]
    for begin, end in zip(cuts, cuts[1:], strict=False):
        part = inner[begin:end]
        if extremes:
            ends = {
                min(part, key=lambda point: point[1]),
                max(part, key=lambda point: point[1]),
            }
            kept += sorted(ends)
        else:
            kept.append(part[-1])
    return [*kept, points[-1]]


def value_range(series: Sequence[Series]) -> tuple[float, float]:
    """From the lowest to the highest value; of faint series only the middle 98 %."""
    values: list[float] = []
    for one in series:
        own = sorted(value for _, value in one.points)
        cut = len(own) // 100 if one.faint else 0
        values += own[cut : len(own) - cut]
    low, high = min(values), max(values)
    margin = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    return (max(0.0, low - margin) if low >= 0 else low - margin), high + margin


def nice_ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers inside [low, high], about so many."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    spacing = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.8)
    first = math.ceil(low / spacing - 1e-9)
    ticks: list[float] = []
    while (first + len(ticks)) * spacing <= high + spacing * 1e-9:
        ticks.append((first + len(ticks)) * spacing)
    return ticks or [low]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """All with as many decimals as tell them apart; very small numbers as powers of ten."""
    if max(abs(tick) for tick in ticks) < 1e-3:
        return [number(tick) for tick in ticks]
    decimals = next(
        (n for n in range(6) if all(abs(round(tick, n) - tick) < 1e-9 for tick in ticks)), 6
    )
    return [f"{tick:,.{decimals}f}" for tick in ticks]


def number(value: float) -> str:
    """Short and readable: 0.0123, 1.5, 1,200, 1e-4."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    if size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.3g}"
