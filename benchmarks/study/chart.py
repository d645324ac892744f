"""Charts drawn with Pillow: points with intervals whose names stand beside them, and lines over an axis; one panel below another."""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import attrs
from PIL import Image, ImageColor, ImageDraw, ImageFont

from benchmarks.study.beside import Arm, names_beside, nearest

WIDTH, LEFT, RIGHT = 1800, 150, 40
"""Pixels of a sheet, and of its margins: twice those of a page, where a browser makes lines smooth."""
SMALL, NORMAL, LARGE = 27, 30, 36
"""Heights of letters, in pixels."""
RADIUS = 12
INK, GREY, FAINT = "#202124", "#5f6368", "#dadce0"
Estimate = tuple[float, float]
"""A mean and the half width of its interval, NaN where there is none, as `benchmarks.intervals` gives them."""
Key = tuple[str, str, str]
"""Shape or "line", color, and what they mean."""


@attrs.frozen
class Axis:
    """What is measured, and where it stands.

    Args:
        label: what is measured, with its unit
        ends: values at both ends
        ticks: values that have a number
        bend: a growing function in which the axis is even, for instance `math.log`
    """

    label: str
    ends: tuple[float, float]
    ticks: Sequence[float]
    bend: Callable[[float], float] = float

    def share(self, value: float) -> float:
        """Place of a value between the ends: 0 at the first, 1 at the second."""
        low, high = map(self.bend, self.ends)
        return (self.bend(value) - low) / (high - low)

    def clipped(self, value: float) -> float:
        return min(max(value, self.ends[0]), self.ends[1])


@attrs.frozen
class Point:
    """A named mean of two measures.

    Args:
        name: as it is written beside the point
        color: of point and name
        shape: "circle", "square", "diamond", "triangle" or "star"
        x, y: means and half widths
    """

    name: str
    color: str
    shape: str
    x: Estimate
    y: Estimate


@attrs.frozen
class Line:
    """A measure over the horizontal axis.

    Args:
        name: as it is written in the legend; lines of one name and color are told once
        color: of the line
        dots: horizontal value, then mean and half width
        marks: horizontal value and shape of what happened on the way; it is drawn on the line
    """

    name: str
    color: str
    dots: Sequence[tuple[float, Estimate]]
    marks: Sequence[tuple[float, str]] = ()

    def at(self, x: float, bend: Callable[[float], float]) -> float:
        """Height of the line between its dots."""
        for (left, (low, _)), (right, (high, _)) in itertools.pairwise(self.dots):
            if left <= x <= right:
                return low + (high - low) * (bend(x) - bend(left)) / (bend(right) - bend(left))
        raise ValueError(f"the line {self.name!r} goes from {self.dots[0][0]} to {self.dots[-1][0]}; it has no height at {x}")


@attrs.frozen
class Level:
    """A dashed line across a panel, with its name on it; the color is that of both.

    Args:
        name: as it is written on it
        color: of line and name
        height: value of the vertical axis
        until: share of the width at which the name ends
    """

    name: str
    color: str
    height: float
    until: float = 1.0


@attrs.frozen
class Panel:
    """One diagram.

    Args:
        title: text above it
        x, y: axes
        tall: pixels between the ends of the vertical axis
        points, lines, levels: what is drawn
    """

    title: str
    x: Axis
    y: Axis
    tall: int
    points: Sequence[Point] = ()
    lines: Sequence[Line] = ()
    levels: Sequence[Level] = ()

    @property
    def height(self) -> int:
        """Pixels with title, numbers and label."""
        return self.tall + 4 * NORMAL + 60

    def place(self, x: float, y: float, top: int) -> tuple[float, float]:
        """Pixel of two values, when the panel begins at the pixel row `top`."""
        across = LEFT + (WIDTH - LEFT - RIGHT) * self.x.share(x)
        return across, top + NORMAL + 30 + self.tall * (1 - self.y.share(y))


def chart(title: str, told: Sequence[str], keys: Sequence[Key], panels: Sequence[Panel]) -> Image.Image:
    """A sheet of panels.

    Args:
        title: text above all
        told: lines below it
        keys: what has no name beside it
        panels: from above to below
    """
    tops = tops_of(told, keys, panels)
    sheet = Image.new("RGB", (WIDTH, tops[-1] + panels[-1].height), "white")
    pen = ImageDraw.Draw(sheet)
    written(pen, (30, 24), title, INK, LARGE)
    for row, line in enumerate(told):
        written(pen, (30, 80 + 38 * row), line, GREY, SMALL)
    for (shape, color, meaning), (x, row) in zip(keys, _places_of(keys), strict=True):
        y = 92 + 38 * len(told) + 40 * row
        if shape == "line":
            pen.line((x, y + 16, x + 44, y + 16), fill=color, width=6)
        else:
            marked(pen, (x + 22, y + 16), color, shape)
        written(pen, (x + 56, y), meaning, INK, SMALL)
    for panel, top in zip(panels, tops, strict=True):
        _drawn(pen, panel, top)
    return sheet


def tops_of(told: Sequence[str], keys: Sequence[Key], panels: Sequence[Panel]) -> list[int]:
    """Pixel row where each panel of a sheet begins; arguments as of `chart`."""
    rows = 1 + max((row for _, row in _places_of(keys)), default=-1)
    return list(itertools.accumulate((panel.height for panel in panels[:-1]), initial=100 + 38 * len(told) + 40 * rows))


def _places_of(keys: Sequence[Key]) -> list[tuple[float, int]]:
    """Left end and row of each key."""
    places, x, row = [], 30.0, 0
    for *_, meaning in keys:
        wide = 90 + ink(meaning, SMALL)
        if x + wide > WIDTH - RIGHT:
            x, row = 30.0, row + 1
        places.append((x, row))
        x += wide
    return places


def in_few_colors(sheet: Image.Image, colors: Iterable[str]) -> Image.Image:
    """The sheet in these colors and in steps from each to white, which makes its file small and keeps every color as it is."""
    parts = [ImageColor.getrgb(color)[:3] for color in dict.fromkeys((INK, GREY, FAINT, *colors))]
    steps = [tuple(part + (255 - part) * step // 4 for part in color) for color in parts for step in range(4)]
    palette = Image.new("P", (1, 1))
    palette.putpalette([part for color in (*steps, (255, 255, 255)) for part in color])
    return sheet.quantize(palette=palette, dither=Image.Dither.NONE)


@functools.cache
def font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def written(pen: ImageDraw.ImageDraw, place: tuple[float, float], text: str, color: str, size: int, anchor: str = "la") -> None:
    pen.text(place, text, fill=color, font=font(size), anchor=anchor, stroke_width=4, stroke_fill="white")


def ink(text: str, size: int) -> float:
    """Width of a text in pixels."""
    return float(font(size).getlength(text))


def marked(pen: ImageDraw.ImageDraw, place: tuple[float, float], color: str, shape: str, radius: float = RADIUS) -> None:
    """Draws a filled shape with a white rim, so that the one beneath stays visible.

    Raises:
        ValueError: there is no such shape.
    """
    corners = {"diamond": (4, 0.0, 1.25), "square": (4, 0.125, 1.25), "triangle": (3, -0.25, 1.35)}
    x, y = place
    if shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color, outline="white", width=2)
        return
    if shape == "star":
        turns = [(turn / 10 - 0.25, radius * (1.7 if turn % 2 == 0 else 0.7)) for turn in range(10)]
    elif shape in corners:
        count, begin, wide = corners[shape]
        turns = [(turn / count + begin, radius * wide) for turn in range(count)]
    else:
        raise ValueError(f"the shape must be circle, star or one of {', '.join(corners)}, not {shape!r}")
    outline = [(x + far * math.cos(2 * math.pi * turn), y + far * math.sin(2 * math.pi * turn)) for turn, far in turns]
    pen.polygon(outline, fill=color, outline="white", width=2)


def _drawn(pen: ImageDraw.ImageDraw, panel: Panel, top: int) -> None:
    (left, floor), (right, ceiling) = (panel.place(panel.x.ends[end], panel.y.ends[end], top) for end in (0, 1))
    written(pen, (left, top), panel.title, INK, NORMAL)
    for tick in panel.y.ticks:
        y = panel.place(panel.x.ends[0], tick, top)[1]
        pen.line((left, y, right, y), fill=FAINT, width=2)
        written(pen, (left - 14, y), f"{tick:,.6g}", GREY, SMALL, "rm")
    for tick in panel.x.ticks:
        x = panel.place(tick, panel.y.ends[0], top)[0]
        pen.line((x, floor, x, floor + 10), fill=GREY, width=2)
        written(pen, (x, floor + 16), f"{tick:,.6g}", GREY, SMALL, "ma")
    pen.line((left, ceiling, left, floor, right, floor), fill=GREY, width=3)
    written(pen, ((left + right) / 2, floor + 56), panel.x.label, INK, SMALL, "ma")
    _upright(pen, panel.y.label, (36, (floor + ceiling) / 2))
    for level in panel.levels:
        _across(pen, level, left, right, panel.place(panel.x.ends[0], level.height, top)[1])
    for line in panel.lines:
        _line(pen, panel, line, top)
    _points(pen, panel, top)


def _upright(pen: ImageDraw.ImageDraw, text: str, middle: tuple[float, float]) -> None:
    """Writes a text that is read from below to above."""
    strip = Image.new("L", (math.ceil(ink(text, SMALL)) + 4, SMALL + 12), 0)
    ImageDraw.Draw(strip).text((2, 2), text, fill=255, font=font(SMALL))
    turned = strip.transpose(Image.Transpose.ROTATE_90)
    pen.bitmap((round(middle[0] - turned.width / 2), round(middle[1] - turned.height / 2)), turned, fill=INK)


def _across(pen: ImageDraw.ImageDraw, level: Level, left: float, right: float, y: float) -> None:
    for start in range(round(left), round(right), 24):
        pen.line((start, y, min(start + 14, right), y), fill=level.color, width=4)
    written(pen, (left + level.until * (right - left) - 6, y - 8), level.name, level.color, SMALL, "rd")


def _line(pen: ImageDraw.ImageDraw, panel: Panel, line: Line, top: int) -> None:
    places = [panel.place(x, mean, top) for x, (mean, _) in line.dots]
    pen.line(places, fill=line.color, width=5, joint="curve")
    for (x, (mean, half)), place in zip(line.dots, places, strict=True):
        _bar(pen, panel, top, (x, mean), math.nan, half, line.color)
        marked(pen, place, line.color, "circle", 9)
    for x, shape in line.marks:
        marked(pen, panel.place(x, line.at(x, panel.x.bend), top), INK, shape, 13)


def _bar(pen: ImageDraw.ImageDraw, panel: Panel, top: int, middle: tuple[float, float], wide: float, high: float, color: str) -> list[Arm]:
    """Intervals across and upwards, paler than the point on them; an end has a cap, and none where the panel ends before it."""
    (x, y), arms, pale = middle, [], pale_of(color)
    for right, up in ((wide, 0.0), (0.0, high)):
        if math.isnan(right + up) or not right + up:
            continue
        ends = [(x + sign * right, y + sign * up) for sign in (-1, 1)]
        inside = [(panel.x.clipped(across), panel.y.clipped(above)) for across, above in ends]
        one, two = (panel.place(*end, top) for end in inside)
        pen.line((*one, *two), fill=pale, width=4)
        cap = (8, 0) if up else (0, 8)
        for (across, above), end, cut in zip((one, two), ends, inside, strict=True):
            if end == cut:
                pen.line((across - cap[0], above - cap[1], across + cap[0], above + cap[1]), fill=pale, width=4)
        arms.append((one, two))
    return arms


def pale_of(color: str) -> tuple[int, ...]:
    """The color of intervals, half way to white."""
    return tuple(part + (255 - part) // 2 for part in ImageColor.getrgb(color))


def _points(pen: ImageDraw.ImageDraw, panel: Panel, top: int) -> None:
    places = [panel.place(point.x[0], point.y[0], top) for point in panel.points]
    bars = [arm for point in panel.points for arm in _bar(pen, panel, top, (point.x[0], point.y[0]), point.x[1], point.y[1], point.color)]
    (left, floor), (right, ceiling) = (panel.place(panel.x.ends[end], panel.y.ends[end], top) for end in (0, 1))
    sizes = [(ink(point.name, SMALL), SMALL + 6) for point in panel.points]
    boxes = names_beside(places, sizes, bars, (left + 4, ceiling, right + RIGHT - 8, floor - 4), RADIUS + 4)
    for box, place, point in zip(boxes, places, panel.points, strict=True):
        end = nearest(box, place)
        if math.dist(place, end) > 2.2 * RADIUS:
            pen.line((*place, *end), fill=point.color, width=2)
    for index, (place, point) in enumerate(zip(places, panel.points, strict=True)):
        above = sum(math.dist(place, other) < RADIUS for other in places[index + 1 :])
        marked(pen, place, point.color, point.shape, RADIUS + 7 * above)  # the rim of one beneath another shows
    for box, point in zip(boxes, panel.points, strict=True):
        written(pen, (box[0], box[1]), point.name, point.color, SMALL)
