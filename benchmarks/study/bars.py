"""Grouped bars from 0 to 1, drawn with Pillow: one panel below another."""

import statistics
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

Values = Mapping[str, Mapping[str, Sequence[float]]]
COLORS = ("#9aa0a6", "#c9ccd1", "#5b8def", "#188038", "#8ab661", "#e8a33d", "#d1495b", "#7b5ea7", "#00897b", "#b0813a", "#3b4a5a")
WIDTH, HEIGHT, TOP, BOTTOM, LEFT = 1560, 300, 52, 34, 46


def bars(panels: Sequence[tuple[str, Values]]) -> Image.Image:
    """A picture of titles and, in each panel, bar name -> group -> values: the bar is their mean, and each value has a dot."""
    names = list(dict.fromkeys(name for _, values in panels for name in values))
    color = {name: COLORS[place % len(COLORS)] for place, name in enumerate(names)}
    legend = 30 * -(-len(names) // 5)
    sheet = Image.new("RGB", (WIDTH, legend + 20 + len(panels) * (TOP + HEIGHT + BOTTOM)), "white")
    pen = ImageDraw.Draw(sheet)
    for place, name in enumerate(names):
        x, y = LEFT + (place % 5) * 300, 14 + 30 * (place // 5)
        pen.rectangle((x, y, x + 18, y + 14), fill=color[name])
        pen.text((x + 26, y - 2), name, fill="black", font_size=15)
    for row, (title, values) in enumerate(panels):
        _panel(pen, legend + 20 + row * (TOP + HEIGHT + BOTTOM), title, values, color)
    return sheet


def _panel(pen: ImageDraw.ImageDraw, top: int, title: str, values: Values, color: Mapping[str, str]) -> None:
    pen.text((LEFT, top + 6), title, fill="black", font_size=17)
    floor = top + TOP + HEIGHT
    for tenth in range(0, 11, 2):
        y = floor - HEIGHT * tenth / 10
        pen.line((LEFT, y, WIDTH - 10, y), fill="#dddddd")
        pen.text((12, y - 8), f"{tenth / 10:.1f}", fill="#555555", font_size=13)
    groups = list(dict.fromkeys(group for entry in values.values() for group in entry))
    span = (WIDTH - 10 - LEFT) / len(groups)
    each = min(70.0, span * 0.86 / len(values))
    for column, group in enumerate(groups):
        start = LEFT + column * span + (span - each * len(values)) / 2
        pen.text((LEFT + column * span + span / 2, floor + 8), group, fill="black", font_size=15, anchor="ma")
        for place, (name, entry) in enumerate(values.items()):
            mean, x = statistics.mean(entry[group]), start + place * each
            pen.rectangle((x + 1, floor - HEIGHT * max(mean, 0), x + each - 1, floor), fill=color[name])
            highest = max(mean, *entry[group], 0)  # the number stands above the dots
            pen.text((x + each / 2, floor - HEIGHT * highest - 17), f"{mean:.2f}", fill="#333333", font_size=11, anchor="ma")
            for dot in entry[group] if len(entry[group]) > 1 else ():
                y = floor - HEIGHT * dot
                pen.ellipse((x + each / 2 - 2.5, y - 2.5, x + each / 2 + 2.5, y + 2.5), fill="black")
