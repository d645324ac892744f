"""Contact sheets: one row a prompt, one column a sample."""

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_LINE = 18


def to_image(picture: Tensor, scale: int = 1) -> Image.Image:
    """[3, H, W] in [0, 1] -> an 8-bit picture, each pixel repeated `scale` times."""
    pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    image = Image.fromarray(pixels)
    return image if scale == 1 else image.resize((scale * image.width, scale * image.height), Image.Resampling.NEAREST)


def contact_sheet(images: Tensor, labels: Sequence[str], title: str = "") -> Image.Image:
    """Rows of pictures under their labels.

    Args:
        images: [P, n, 3, H, W] in [0, 1]
        labels: P texts
        title: above the sheet
    """
    rows, columns, _, height, width = images.shape
    scale = max(1, 96 // max(height, width))
    cell_width, cell_height, gap = scale * width, scale * height, 4
    sheet = Image.new(
        "RGB", (columns * (cell_width + gap) + gap, rows * (cell_height + gap + _LINE) + gap + (_LINE if title else 0)), "white"
    )
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    top = gap
    if title:
        draw.text((gap, top), title, fill="black", font=ImageFont.load_default(15))
        top += _LINE
    for row in range(rows):
        draw.text((gap, top), labels[row], fill="black", font=font)
        top += _LINE
        for column in range(columns):
            sheet.paste(to_image(images[row, column], scale), (gap + column * (cell_width + gap), top))
        top += cell_height + gap
    return sheet


def side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    """Two pictures next to each other on white."""
    sheet = Image.new("RGB", (left.width + right.width + 16, max(left.height, right.height)), "white")
    sheet.paste(left, (0, 0))
    sheet.paste(right, (left.width + 16, 0))
    return sheet
