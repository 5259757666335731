"""Curves as inline SVG in HTML, which need neither a script nor a network.

The SVG is stretched to the width it is given, and its strokes are not; numbers at the axes are HTML beside it, so that they
stay legible on a phone. Colours are classes of `report.css`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from html import escape

_MOST_MARKED = 60  # measurements that have a dot each


@dataclasses.dataclass(frozen=True)
class Line:
    """One curve: `points` are (step, value), those that are no number are left out; `style` is a class of `report.css`.
    `marked` gives each point a dot that tells its value under the pointer."""

    name: str
    style: str
    points: Sequence[tuple[int, float | None]]
    marked: bool = False

    @property
    def finite(self) -> list[tuple[int, float]]:
        """The points that can be drawn."""
        return [(step, value) for step, value in self.points if value is not None and math.isfinite(value)]


def chart(title: str, lines: Sequence[Line], *, shown: Callable[[float], str], last: int, zero: bool = False,
          note: str = "", small: bool = False) -> str:
    """A figure of the lines over the steps 0 to `last`; "" where no line has two points. `shown` writes a value, `zero` keeps
    zero in view and marks it."""
    lines = [line for line in lines if line.finite]
    if not any(len(line.finite) > 1 for line in lines):
        return ""
    low, high = _range([value for line in lines for _, value in line.finite], zero=zero)

    def x(step: float) -> float:
        return 100 * step / max(1, last)

    def y(value: float) -> float:
        return 100 * (high - min(max(value, low), high)) / (high - low)
    rows, columns = _ticks(low, high, 4), [n for n in _ticks(0, last, 3 if small else 5) if n == int(n)]
    grid = "".join(f'<path class="{"zero" if zero and not value else "line"}" d="M0 {y(value):.2f}H100"/>' for value in rows)
    drawn = "".join(_drawn(line, x, y, shown) for line in lines)
    labels = "".join(f'<span class="y" style="top:{y(value):.1f}%">{escape(shown(value))}</span>' for value in rows)
    labels += "".join(f'<span class="x" style="left:{x(step):.1f}%">{int(step):,}</span>' for step in columns)
    named = "".join(f'<span class="{line.style}">{escape(line.name)}</span>' for line in lines if len(lines) > 1)
    about = f'<p class="note">{escape(note)}</p>' if note else ""
    return (f'<figure class="chart{" small" if small else ""}"><figcaption><b>{escape(title)}</b><span class="legend">{named}'
            f'</span></figcaption><div class="plot"><svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" '
            f'aria-label="{escape(title)}">{grid}{drawn}</svg>{labels}</div>{about}</figure>')


def _drawn(line: Line, x: Callable[[float], float], y: Callable[[float], float], shown: Callable[[float], str]) -> str:
    points = line.finite
    path = "L".join(f"{x(step):.2f} {y(value):.2f}" for step, value in points)
    made = f'<path class="{line.style}" d="M{path}"/>'
    if line.marked and len(points) <= _MOST_MARKED:  # a line of no length with round ends is a dot that is not stretched
        made += "".join(f'<path class="dot {line.style}" d="M{x(step):.2f} {y(value):.2f}h0"><title>step {step}: '
                        f'{escape(line.name)} {escape(shown(value))}</title></path>' for step, value in points)
    return made


def _range(values: list[float], *, zero: bool) -> tuple[float, float]:
    """What to show of the values: a few wild steps must not flatten a curve, so that of 98 % of them."""
    ordered = sorted(values)
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.01, 0.99))
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 0.01
    return (max(low - margin, 0.0) if low >= 0 else low - margin), high + margin


def _ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers between low and high."""
    rough = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    spacing = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= rough * 0.999)
    first = math.ceil(low / spacing - 1e-9)
    return [n * spacing for n in range(first, math.floor(high / spacing + 1e-9) + 1)]
