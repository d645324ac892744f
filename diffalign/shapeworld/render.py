"""Rendering of ShapeWorld scenes: 64x64 images, in which everything that the caption does not fix is random."""

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from .grammar import COLORS, Count, Relation, Scene, Text

SIZE = 64
Array = NDArray[np.floating[Any]]
_Y, _X = (axis.astype(np.float32) + 0.5 for axis in np.mgrid[:SIZE, :SIZE])


def distance(shape: str, x: Array, y: Array, radius: float) -> Array:
    """Signed distance in pixels to the outline of a shape centred at the origin: negative inside.

    Args:
        x, y: pixel positions relative to the centre, y downwards; any shape
        radius: half of the shape's larger extent, in pixels
    """
    signed: Array
    if shape == "circle":
        signed = np.hypot(x, y) - radius
    elif shape == "square":
        signed = np.maximum(abs(x), abs(y)) - 0.88 * radius
    elif shape == "triangle":  # apex up, base and height 2 r
        side = (2 * abs(x) - (y + radius)) / 5**0.5
        signed = np.maximum(side, y - radius)
    elif shape == "cross":
        long, short = radius, 0.36 * radius
        signed = np.minimum(np.maximum(abs(x) - long, abs(y) - short), np.maximum(abs(x) - short, abs(y) - long))
    else:
        raise ValueError(f"no shape is called {shape!r}")
    return signed


@functools.cache
def glyph(character: str, size: int) -> Array:
    """Draw a character at a font size, cropped to its bounding box: [h, w] in [0, 1]. The font is part of Pillow."""
    image = Image.new("L", (2 * size, 2 * size))
    ImageDraw.Draw(image).text((size // 2, size // 4), character, fill=255, font=ImageFont.load_default(size), stroke_width=1)
    return np.asarray(image.crop(image.getbbox()), dtype=np.float32) / 255


def draw(scene: Scene, random: np.random.Generator) -> Array:
    """Draw one image of the scene: [3, 64, 64] in [0, 1]. Position, size, shade and background come from `random`."""
    background = np.clip(random.uniform(0.75, 1.0) + random.uniform(-0.05, 0.05, 3), 0, 1)
    image = np.broadcast_to(background[:, None, None], (3, SIZE, SIZE)).astype(np.float32)
    if isinstance(scene, Text):
        return _blend(image, _text_ink(scene.text, random), scene.color, random)
    for item, (x, y, radius) in zip(scene.items, _place(scene, random), strict=True):
        ink = np.clip(0.5 - distance(item.shape, _X - x, _Y - y, radius), 0, 1)
        image = _blend(image, ink, item.color, random)
    return image


def _blend(image: Array, ink: Array, color: str, random: np.random.Generator) -> Array:
    shade = np.clip(np.array(COLORS[color]) + random.uniform(-0.06, 0.06, 3), 0, 1)
    return (image * (1 - ink) + shade[:, None, None] * ink).astype(np.float32)


def _place(scene: Scene, random: np.random.Generator) -> list[tuple[float, float, float]]:
    """Draw centres and radii of items that do not touch and that fulfil the relation, if there is one."""
    count = len(scene.items)  # type: ignore[union-attr]
    low, high = (7.0, 10.0) if isinstance(scene, Count) and count <= 3 else (6.0, 8.0) if isinstance(scene, Count) else (7.5, 11.0)
    while True:
        radii = random.uniform(low, high, count)
        places: list[tuple[float, float, float]] = []
        for radius in radii:
            for _ in range(60):
                x, y = random.uniform(radius + 1, SIZE - radius - 1, 2)
                # squares and crosses reach into the corners of their box, so radii are scaled by 1.15
                if all(np.hypot(x - u, y - v) > 1.15 * (radius + r) + 1 for u, v, r in places):
                    places.append((x, y, radius))
                    break
            else:
                break
        if len(places) == count and (not isinstance(scene, Relation) or _holds(scene.relation, places)):
            return places


def _holds(relation: str, places: list[tuple[float, float, float]]) -> bool:
    (x, y, r), (u, v, s) = places
    gap = {"left of": u - x, "right of": x - u, "above": v - y, "below": y - v}[relation]
    across = abs(y - v) if relation in ("left of", "right of") else abs(x - u)
    return bool(gap > r + s and gap > 1.5 * across)


def _text_ink(text: str, random: np.random.Generator) -> Array:
    size = int(random.integers(28, 32))
    inks = [glyph(character, size) for character in text]
    gap = int(random.integers(3, 6))
    width, height = sum(ink.shape[1] for ink in inks) + gap, max(ink.shape[0] for ink in inks)
    x = int(random.integers(2, SIZE - width - 1))
    y = int(random.integers(2, SIZE - height - 1))
    canvas = np.zeros((SIZE, SIZE), dtype=np.float32)
    for ink in inks:
        canvas[y : y + ink.shape[0], x : x + ink.shape[1]] = ink
        x += ink.shape[1] + gap
    return canvas
