"""Line charts as inline SVG, drawn here so that a page needs nothing from elsewhere."""

import json
import math
from dataclasses import dataclass
from html import escape

from finchtune.report.series import Points, thinned

WIDTH, HEIGHT = 560, 270
LEFT, RIGHT, TOP, BOTTOM = 76, 24, 12, 42  # a label of 8 characters fits at the left, also large
COLOURS = 8
DASHES = ("", "7 3", "2 3", "9 3 2 3")  # told apart without colour too


@dataclass
class Line:
    """One curve. `run` chooses colour and dashes; `faint` draws it thin, `dots` with marks."""

    label: str
    points: Points
    run: int = 0
    faint: bool = False
    dots: bool = False


def chart(title: str, unit: str, lines: list[Line], log: bool = False) -> str:
    """A figure: title, unit, the curves over the step. `log`: a logarithmic axis.

    Curves without points are left out; with none left, the figure says so.
    """
    lines = [Line(**vars(line) | {"points": _drawable(line.points, log)}) for line in lines]
    lines = [line for line in lines if line.points]
    head = f"<figcaption>{escape(title)} <span>{escape(unit)}</span></figcaption>"
    if not lines:
        return f'<figure class="empty">{head}<p>nothing recorded</p></figure>'
    x_axis = Axis([x for line in lines for x, _ in line.points], LEFT, WIDTH - RIGHT)
    y_values = [y for line in lines for _, y in line.points]
    y_axis = Axis(y_values, HEIGHT - BOTTOM, TOP, log, pad=True)
    body = "".join([*_grid(x_axis, y_axis), *(_curve(line, x_axis, y_axis) for line in lines)])
    named = f"{title} over the step, {unit}"
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(named)}">{body}'
        f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg>'
    )
    return f"<figure>{head}{svg}{_hover_data(lines, x_axis)}</figure>"


def _drawable(points: Points, log: bool) -> Points:
    return thinned([p for p in points if p[1] > 0] if log else points)


class Axis:
    """A linear or logarithmic scale from values to pixels, with round ticks."""

    def __init__(
        self, values: list[float], start: float, end: float, log: bool = False, pad: bool = False
    ):
        self.log, self.start, self.end = log, start, end
        low, high = self._map(min(values)), self._map(max(values))
        if high == low:
            spread = abs(low) * 0.1 or 1.0
            low, high = low - spread, high + spread
        margin = 0.06 * (high - low) if pad else 0.0
        self.low, self.high = low - margin, high + margin
        if pad and not log and min(values) >= 0:
            self.low = max(self.low, 0.0)

    def _map(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def __call__(self, value: float) -> float:
        share = (self._map(value) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, wanted: int) -> list[float]:
        """Round values inside the axis: steps of 1, 2 or 5 times a power of ten."""
        if self.log and self.high - self.low >= 1:
            decades = range(math.floor(self.low), math.ceil(self.high) + 1)
            leads = (1,) if len(decades) > 4 else (1, 3)
            found = [lead * 10.0**d for d in decades for lead in leads]
            inside = [v for v in found if self.low <= math.log10(v) <= self.high]
            return inside[:: max(1, -(-len(inside) // (2 * wanted)))]
        low, high = (10**self.low, 10**self.high) if self.log else (self.low, self.high)
        raw = (high - low) / wanted
        size = 10.0 ** math.floor(math.log10(raw))
        step = next(size * m for m in (1, 2, 5, 10) if size * m >= raw * 0.999)
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        return [round(i * step, 12) for i in range(first, last + 1)]


def number(value: float) -> str:
    """A value as short as it can be read: 12,300 or 0.042 or 2e-5."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-3:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _grid(x_axis: Axis, y_axis: Axis) -> list[str]:
    parts = []
    for tick in y_axis.ticks(5):
        y = y_axis(tick)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(
            f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>'
        )
    for tick in x_axis.ticks(6):
        if tick == int(tick):
            x = x_axis(tick)
            parts.append(
                f'<text x="{x:.1f}" y="{HEIGHT - 22}" text-anchor="middle">{number(tick)}</text>'
            )
    base = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    parts.append(
        f'<text class="unit" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">step</text>'
    )
    return parts


def _curve(line: Line, x_axis: Axis, y_axis: Axis) -> str:
    colour = f"s{line.run % COLOURS}"
    places = [(x_axis(x), y_axis(y)) for x, y in line.points]
    if line.faint:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        return f'<polyline class="curve faint {colour}" points="{path}"/>'
    dash = DASHES[line.run % len(DASHES)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    drawn = f'<polyline class="curve {colour}" stroke-dasharray="{dash}" points="{path}"/>'
    if line.dots or len(places) == 1:
        drawn += "".join(
            f'<circle class="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places
        )
    return drawn


def _hover_data(lines: list[Line], x_axis: Axis) -> str:
    """The points for the script that shows values under the pointer."""
    data = {
        "x": [x_axis.low, x_axis.high, x_axis.start, x_axis.end],
        "lines": [
            {
                "label": line.label,
                "run": line.run % COLOURS,
                "points": [[x, number(y)] for x, y in line.points],
            }
            for line in lines
            if not line.faint
        ],
    }
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json">{text}</script>'
