"""Contact sheets of images: the samples of each prompt under its text."""

import math
from collections.abc import Mapping, Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from diffalign.core import Size

_LINE = 18
_ACROSS = 12


def to_image(picture: Tensor, scale: int = 1) -> Image.Image:
    """Convert [3, H, W] in [0, 1] to an 8-bit image, with each pixel repeated `scale` times."""
    pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    image = Image.fromarray(pixels)
    return image if scale == 1 else image.resize((scale * image.width, scale * image.height), Image.Resampling.NEAREST)


def contact_sheet(images: Tensor, labels: Sequence[str], title: str = "") -> Image.Image:
    """Draw the images of each prompt under its label, side by side; more than 12 of a prompt stand in several lines.

    Args:
        images: [P, n, 3, H, W] in [0, 1]
        labels: P texts
        title: text above the sheet
    """
    rows, samples, _, height, width = images.shape
    lines = max(1, math.ceil(samples / _ACROSS))
    columns = math.ceil(samples / lines)
    scale = max(1, 96 // max(height, width))
    gap = 4
    across, down = scale * width + gap, scale * height + gap
    sheet = Image.new("RGB", (columns * across + gap, rows * (lines * down + _LINE) + gap + (_LINE if title else 0)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    top = gap
    if title:
        draw.text((gap, top), title, fill="black", font=ImageFont.load_default(15))
        top += _LINE
    for row in range(rows):
        draw.text((gap, top), labels[row], fill="black", font=font)
        top += _LINE
        for sample in range(samples):
            line, column = divmod(sample, columns)
            sheet.paste(to_image(images[row, sample], scale), (gap + column * across, top + line * down))
        top += lines * down
    return sheet


def merged(parts: Sequence[tuple[Sequence[int], Mapping[str, Tensor]]], sizes: Sequence[Size]) -> dict[str, Tensor]:
    """Merge the tables of several groups of prompts into one, in the order of the prompts.

    Args:
        parts: for each group, the places of its prompts and tensors with a row for each; "images" [p, n, 3, H, W] only for the first p
        sizes: sizes that the prompts ask for; with several groups, images get the largest height and width
    """
    if len(parts) == 1:
        return dict(parts[0][1])
    canvas = max(height for height, _ in sizes), max(width for _, width in sizes)
    order = torch.tensor([place for places, _ in parts for place in places]).argsort()
    table = {name: torch.cat([part[name] for _, part in parts])[order] for name in parts[0][1] if name != "images"}
    kept = [(places, part["images"]) for places, part in parts if len(part["images"])]
    if not kept:
        return {**table, "images": parts[0][1]["images"]}
    drawn = torch.tensor([place for places, images in kept for place in places[: len(images)]]).argsort()
    return {**table, "images": torch.cat([on_canvas(images, canvas) for _, images in kept])[drawn]}


def on_canvas(images: Tensor, size: Size) -> Tensor:
    """Put images [..., 3, h, w] into the upper left corner of white images [..., 3, H, W]; larger ones are scaled down."""
    height, width = images.shape[-2:]
    scale = min(1.0, size[0] / height, size[1] / width)
    inside = max(1, round(scale * height)), max(1, round(scale * width))
    flat = images.flatten(0, -4).float()
    small = flat if scale == 1 else F.interpolate(flat, size=inside, mode="bilinear", antialias=True).clamp(0, 1)
    padded: Tensor = F.pad(small, (0, size[1] - inside[1], 0, size[0] - inside[0]), value=1.0)
    return padded.to(images.dtype).reshape(*images.shape[:-2], *size)


def side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    """Put two images next to each other on white."""
    sheet = Image.new("RGB", (left.width + right.width + 16, max(left.height, right.height)), "white")
    sheet.paste(left, (0, 0))
    sheet.paste(right, (left.width + 16, 0))
    return sheet


def comparison_sheet(columns: Mapping[str, Tensor], labels: Sequence[str]) -> Image.Image:
    """Draw one row per prompt and one column per run. The samples of a run stand side by side, in two lines if there are more than three.

    Args:
        columns: images by the run's name, each [P, n, 3, H, W] in [0, 1]
        labels: P texts
    """
    across = [math.ceil(images.shape[1] / (1 if images.shape[1] < 4 else 2)) for images in columns.values()]
    side, gap = 96, 4
    widths = [count * (side + gap) + 3 * gap for count in across]
    down = [math.ceil(images.shape[1] / count) for images, count in zip(columns.values(), across, strict=True)]
    height = max(down) * (side + gap) + _LINE + gap
    sheet = Image.new("RGB", (sum(widths) + gap, len(labels) * height + _LINE + 2 * gap), "white")
    draw = ImageDraw.Draw(sheet)
    left = gap
    for (name, images), count, width in zip(columns.items(), across, widths, strict=True):
        draw.text((left, gap), _fitting(name, width), fill="black", font=ImageFont.load_default(15))
        for row, samples in enumerate(images):
            top = 2 * gap + (row + 1) * _LINE + row * (height - _LINE) + gap
            for number, sample in enumerate(samples):
                place = (left + (number % count) * (side + gap), top + _LINE + (number // count) * (side + gap))
                sheet.paste(_boxed(to_image(sample), side), place)
        left += width
    for row, label in enumerate(labels):
        draw.text((gap, 2 * gap + (row + 1) * _LINE + row * (height - _LINE)), label, fill="black", font=ImageFont.load_default(13))
    return sheet


def _boxed(image: Image.Image, side: int) -> Image.Image:
    """Scale an image into a square; when it grows, pixels are repeated, not blurred."""
    scale = side / max(image.size)
    size = (max(1, round(scale * image.width)), max(1, round(scale * image.height)))
    return image.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS)


def _fitting(text: str, width: int) -> str:
    """Cut a text to fit a column of 15-point letters."""
    most = max(4, width // 8)
    return text if len(text) <= most else f"{text[: most - 1]}\u2026"
