"""Recognition of ShapeWorld images from their pixels: coloured shapes with their positions, or two characters."""

import functools

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .grammar import ALPHABET, COLORS, SHAPES
from .render import SIZE, distance, glyph

SPECK = 20
"""Least number of pixels of an object; fewer are noise. The smallest shape that is drawn has 72."""

GRID = 20
"""Number of points along each side of the grid on which patches are compared with templates."""

Floats = NDArray[np.float32]
Ints = NDArray[np.intp]
Bools = NDArray[np.bool_]


@attrs.frozen
class Found:
    """Object in an image.

    Args:
        color, shape: the nearest of `COLORS` and `SHAPES`
        x, y: middle of the bounding box in pixels, from the left and from the top
        area: number of pixels
        quality: fit of the outline to the shape, in [0, 1]: intersection over union with a drawn shape, both stretched to one box, times
            the shorter over the longer side of the patch
    """

    color: str
    shape: str
    x: float
    y: float
    area: int
    quality: float


@attrs.frozen
class Reading:
    """Two characters that were read from an image.

    Args:
        text: the best fitting characters, left and right
        fits: for the left and the right place, the fit of each character of `ALPHABET`, in [0, 1]: intersection over union with the
            glyph, both stretched to one box
        colors: the share of the ink that has each of `COLORS`; they add up to 1
    """

    text: str
    fits: tuple[dict[str, float], dict[str, float]]
    colors: dict[str, float]


@attrs.frozen(eq=False)
class _Patches:
    """Patches: C sets of pixels, each within one image."""

    label: Ints  # [K, H, W]  patch of each pixel, -1 for no patch
    image: Ints  # [C]
    area: Ints  # [C]     pixels
    low: Ints  # [C, 2]  first row and column
    sides: Ints  # [C, 2]  height and width


def find_objects(images: Tensor) -> list[list[Found]]:
    """Find the objects of each image, largest first.

    A pixel is ink if its colour is at least half way from the background (the median of the image) to one of the five colours. Connected
    ink of one colour is one object, if it has at least `SPECK` pixels.

    Args:
        images: [K, 3, 64, 64] in [0, 1], floating point, any device

    Raises:
        ValueError: the images have another shape, type or range.
    """
    kind = _ink(images)
    patches = _connected(kind)
    fits = _fits(patches, _shape_templates())
    best = fits.argmax(1)
    quality = fits.max(1) * patches.sides.min(1) / patches.sides.max(1)
    middle = patches.low + patches.sides / 2
    colors = list(COLORS)
    color = np.zeros(len(best), dtype=np.intp)
    color[patches.label[patches.label >= 0]] = kind[patches.label >= 0] - 1
    found: list[list[Found]] = [[] for _ in images]
    for i in np.argsort(-patches.area, kind="stable").tolist():
        y, x = middle[i].tolist()
        found[patches.image[i]].append(Found(colors[color[i]], SHAPES[best[i]], x, y, int(patches.area[i]), float(quality[i])))
    return found


def read_text(images: Tensor) -> list[Reading | None]:
    """Read each image as two characters side by side; None if there is no ink.

    The ink is divided at the emptiest column in the middle half of its bounding box, and each part is compared with the glyphs.

    Args:
        images: [K, 3, 64, 64] in [0, 1], floating point, any device

    Raises:
        ValueError: the images have another shape, type or range.
    """
    kind = _ink(images)
    strokes = _connected((kind > 0).astype(np.int8))
    inked = strokes.label >= 0
    columns = np.arange(SIZE)
    profile = inked.sum(1)
    first, last = (profile > 0).argmax(1)[:, None], SIZE - 1 - (profile[:, ::-1] > 0).argmax(1)[:, None]
    off = abs(columns - (first + last) / 2)
    # among equally empty columns, take the one nearest to the middle
    split = np.where(off <= (last - first) / 4, profile + off / SIZE, np.inf).argmin(1)
    side = 2 * np.arange(len(kind))[:, None] + (columns >= split[:, None])
    halves = _measured(np.where(inked, side[:, None, :], -1), 2 * len(kind))
    fits = _fits(halves, _glyph_templates()).reshape(-1, 2, len(ALPHABET))
    readings: list[Reading | None] = []
    for i, (fit, colored) in enumerate(zip(fits, kind, strict=True)):
        if not inked[i].any():
            readings.append(None)
            continue
        shares = np.bincount(colored[inked[i]], minlength=len(COLORS) + 1)[1:] / inked[i].sum()
        left, right = (dict(zip(ALPHABET, row.tolist(), strict=True)) for row in fit)
        text = "".join(max(place, key=place.__getitem__) for place in (left, right))
        readings.append(Reading(text, (left, right), dict(zip(COLORS, shares.tolist(), strict=True))))
    return readings


def check_images(images: Tensor) -> None:
    """Refuse images that are not [K, 3, 64, 64] floating point numbers in [0, 1], within 0.001.

    Raises:
        ValueError: the images have another shape, type or range.
    """
    if images.ndim != 4 or images.shape[1:] != (3, SIZE, SIZE) or not images.is_floating_point():
        raise ValueError(
            f"ShapeWorld's scorers read floating point images of shape (K, 3, {SIZE}, {SIZE}); "
            f"got {images.dtype} of shape {tuple(images.shape)}."
        )
    low, high = (float(bound) for bound in images.detach().aminmax()) if images.numel() else (0.0, 1.0)
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # this form also refuses NaN
        raise ValueError(f"ShapeWorld's scorers read images with values in [0, 1]; got values from {low:.3g} to {high:.3g}.")


def _ink(images: Tensor) -> NDArray[np.int8]:
    """Classify pixels: 0 for background, 1 + index into `COLORS` for ink, [K, H, W]."""
    check_images(images)
    pixels = images.detach().to("cpu", torch.float32).numpy()
    kind = np.zeros((len(pixels), SIZE, SIZE), dtype=np.int8)
    background = np.median(pixels[:, :, ::2, ::2].reshape(len(pixels), 3, -1), axis=2) if len(pixels) else np.zeros((0, 3), np.float32)
    offset = pixels - background[:, :, None, None]
    # a patch of another grey is not ink, even if it is far from the background
    colorful = pixels.max(1) - pixels.min(1) > 0.15
    image, y, x = np.nonzero(colorful & (abs(offset).max(1) > 0.15))
    offset = offset[image, :, y, x]
    along = np.array(list(COLORS.values()), dtype=np.float32) - background[:, None]  # [K, 5, 3]
    cover = np.einsum("ic,ikc->ik", offset, (along / np.square(along).sum(-1, keepdims=True).clip(1e-6))[image])
    miss = np.square(offset[:, None] - cover[..., None] * along[image]) @ np.ones(3, np.float32)
    nearest = miss.argmin(1)
    rows = np.arange(len(nearest))
    solid = cover[rows, nearest] > 0.5
    kind[image[solid], y[solid], x[solid]] = nearest[solid] + 1
    return kind


def _connected(kind: NDArray[np.int8]) -> _Patches:
    """Find connected patches of equal kind (pixels that share a side), without specks."""
    inked = kind > 0
    begins = inked.copy()
    begins[..., 1:] &= kind[..., 1:] != kind[..., :-1]
    run = np.cumsum(begins).reshape(kind.shape) - 1  # runs of equal pixels in a row, numbered from the top
    joined = inked[:, 1:] & (kind[:, 1:] == kind[:, :-1])
    lower, upper = run[:, 1:][joined], run[:, :-1][joined]
    root = np.arange(int(begins.sum()))
    while True:  # each round connects roots to smaller roots, and then every run directly to its root
        low, high = np.sort([root[lower], root[upper]], axis=0)
        if (low == high).all():
            break
        np.minimum.at(root, high, low)
        while (root[root] != root).any():
            root = root[root]
    area = np.bincount(root[run[inked]], minlength=len(root))
    number = np.where(area >= SPECK, np.cumsum(area >= SPECK) - 1, -1)
    label = np.full(kind.shape, -1)
    label[inked] = number[root[run[inked]]]
    return _measured(label, int((area >= SPECK).sum()))


def _measured(label: Ints, count: int) -> _Patches:
    image, row, column = np.nonzero(label >= 0)
    patch = label[image, row, column]
    low, high = np.full((count, 2), SIZE), np.full((count, 2), -1)
    for axis, place in enumerate((row, column)):
        np.minimum.at(low[:, axis], patch, place)
        np.maximum.at(high[:, axis], patch, place)
    images = np.zeros(count, dtype=np.intp)
    images[patch] = image
    return _Patches(label, images, np.bincount(patch, minlength=count), low, high - low + 1)


def _fits(patches: _Patches, templates: Floats) -> Floats:
    """Intersection over union of each patch with the nearest variant of each template: [C, templates]."""
    steps = (np.arange(GRID) + 0.5) / GRID
    at = patches.low[..., None] + (steps * patches.sides[..., None]).astype(np.intp)  # [C, 2, GRID]
    at = at.clip(0, SIZE - 1)
    sampled = patches.label[patches.image[:, None, None], at[:, 0, :, None], at[:, 1, None, :]]
    mask = (sampled == np.arange(len(sampled))[:, None, None]).reshape(len(sampled), GRID * GRID).astype(np.float32)
    flat = templates.reshape(-1, GRID * GRID)
    both = mask @ flat.T
    either = mask.sum(1)[:, None] + flat.sum(1) - both
    fits: Floats = (both / either).reshape(len(mask), *templates.shape[:2]).max(2)
    return fits


def _stretched(mask: Bools) -> Bools:
    """Crop a mask to its bounding box and sample it on GRID x GRID points."""
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    steps = (np.arange(GRID) + 0.5) / GRID
    y = rows[0] + (steps * (rows[-1] - rows[0] + 1)).astype(np.intp)
    x = columns[0] + (steps * (columns[-1] - columns[0] + 1)).astype(np.intp)
    return mask[np.ix_(y, x)]


@functools.cache
def _shape_templates() -> Floats:
    """Templates of shapes in several radii, positions between pixels, and blurs (0, 1 and 1.4 pixels): [shapes, variants, GRID, GRID]."""
    reach = np.arange(-13, 14, dtype=np.float32)
    y, x = np.meshgrid(reach, reach, indexing="ij")
    sharp, blur = np.eye(len(reach)), np.exp(-np.square(y - x) / 2)
    blur /= blur.sum(1, keepdims=True)
    variants: list[list[Bools]] = []
    for shape in SHAPES:
        variants.append([])
        inks = [
            np.clip(0.5 - distance(shape, x - dx, y - dy, radius), 0, 1)
            for radius in np.arange(5.5, 11.5, 0.5)
            for dx in (0.0, 0.25, 0.5)
            for dy in (0.0, 0.5)
        ]
        # blur rounds corners, and a small square with round corners fits a sharp circle better than a sharp square
        for smooth in (sharp, blur, blur @ blur):
            variants[-1] += [_stretched(smooth @ ink @ smooth.T > 0.5) for ink in inks]
    return np.array(variants, dtype=np.float32)


@functools.cache
def _glyph_templates() -> Floats:
    """Templates of characters in several font sizes: [characters, variants, GRID, GRID]."""
    return np.array([[_stretched(glyph(character, size) > 0.5) for size in range(26, 35)] for character in ALPHABET], dtype=np.float32)
