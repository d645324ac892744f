"""Line and scatter charts as SVG."""

from collections.abc import Sequence
from html import escape

import attrs

from .intervals import Interval

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 60, 12, 10, 22
COLORS = 6
"""Number of colours in the page's style, --c0 ... --c5; with more runs they repeat."""

Points = Sequence[tuple[float, float]]


@attrs.frozen
class _Scale:
    """Scale that maps numbers to positions in the drawing."""

    low: tuple[float, float]
    high: tuple[float, float]

    @classmethod
    def around(cls, points: Points, margin: float = 0.0) -> "_Scale":
        ends = []
        for axis in (0, 1):
            low, high = min(point[axis] for point in points), max(point[axis] for point in points)
            if low == high:  # a flat line lies at the bottom
                ends.append((low, low + (abs(low) or 1.0)))
            else:
                ends.append((low - margin * (high - low), high + margin * (high - low)))
        (left, right), (bottom, top) = ends
        return cls((left, bottom), (right, top))

    def x(self, value: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (value - self.low[0]) / (self.high[0] - self.low[0]), 1)

    def y(self, value: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - self.low[1]) / (self.high[1] - self.low[1]), 1)

    def line(self, points: Points, color: str, width: float, dash: str = "") -> str:
        places = " ".join(f"{self.x(x)},{self.y(y)}" for x, y in points)
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        return f'<polyline points="{places}" fill="none" stroke="var(--{color})" stroke-width="{width}"{dashed}/>'


def curve(points: Points, what: str) -> str:
    """Draw the values by step in a faint line, and their running mean over a tenth of the run.

    Args:
        points: (step, value), at least 2
        what: description for readers who cannot see the chart
    """
    scale = _Scale.around(points)
    window = max(1, len(points) // 10)
    recent = [points[max(0, i - window + 1) : i + 1] for i in range(len(points))]
    smooth = [(points[i][0], sum(y for _, y in some) / len(some)) for i, some in enumerate(recent)]
    low, high = min(y for _, y in points), max(y for _, y in points)
    ends = _labels(low, high) if high > low else (f"{low:.3g}", "")
    body = scale.line(points, "faint", 1) + scale.line(smooth, "accent", 2)
    return _chart(body, what, (f"{points[0][0]:g}", f"step {points[-1][0]:g}"), ends)


@attrs.frozen
class Place:
    """Position of one run in the plane of reward and diversity.

    Args:
        name: name of the run
        x, y: diversity and reward, with intervals
        path: earlier positions, oldest first
    """

    name: str
    x: Interval
    y: Interval
    path: Points = ()


def front(places: Sequence[Place], what: str) -> str:
    """Draw a cross of two intervals for every run, its earlier positions as a dashed line, and a legend below."""
    corners = [(x, y) for place in places for x in _reach(place.x) for y in _reach(place.y)]
    scale = _Scale.around([*corners, *(point for place in places for point in place.path)], 0.06)
    body = ""
    for number, place in enumerate(places):
        color, x, y = f"c{number % COLORS}", place.x.mean, place.y.mean
        if place.path:
            body += scale.line([*place.path, (x, y)], color, 1, "3 3")
            body += "".join(f'<circle cx="{scale.x(a)}" cy="{scale.y(b)}" r="2" fill="var(--{color})"/>' for a, b in place.path)
        body += scale.line([(end, y) for end in _reach(place.x)], color, 1.5) + scale.line(
            [(x, end) for end in _reach(place.y)], color, 1.5
        )
        body += f'<circle cx="{scale.x(x)}" cy="{scale.y(y)}" r="4" fill="var(--{color})"/>'
    ends_x, ends_y = zip(scale.low, scale.high, strict=True)
    left, right = _labels(*ends_x)
    chart = _chart(body, what, (left, f"diversity {right}"), _labels(*ends_y))
    keys = "".join(
        f'<span class="run"><span class="key" style="background: var(--c{number % COLORS})"></span>{escape(place.name)}</span> '
        for number, place in enumerate(places)
    )
    return f'{chart}<p class="soft">{keys}</p>' if len(places) > 1 else chart


def _labels(low: float, high: float) -> tuple[str, str]:
    """Label both ends of an axis, with enough digits to tell them apart."""
    digits = next(digits for digits in range(3, 18) if f"{low:.{digits}g}" != f"{high:.{digits}g}" or digits == 17)
    return f"{low:.{digits}g}", f"{high:.{digits}g}"


def _reach(interval: Interval) -> tuple[float, float]:
    low = interval.mean if interval.low is None else interval.low
    return low, interval.mean if interval.high is None else interval.high


def _chart(body: str, what: str, ends_x: tuple[str, str], ends_y: tuple[str, str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(what, quote=True)}">'
        f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}" fill="none" stroke="var(--line)"/>{body}'
        f'<text x="{LEFT - 4}" y="{TOP + 8}" text-anchor="end">{ends_y[1]}</text>'
        f'<text x="{LEFT - 4}" y="{HEIGHT - BOTTOM}" text-anchor="end">{ends_y[0]}</text>'
        f'<text x="{LEFT}" y="{HEIGHT - 6}">{ends_x[0]}</text>'
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{ends_x[1]}</text></svg>'
    )
