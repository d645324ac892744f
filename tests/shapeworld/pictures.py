"""Pictures for tests: shapes placed by hand, and what makes a picture worse."""

import numpy as np
import torch

from diffalign.shapeworld.grammar import COLORS
from diffalign.shapeworld.render import SIZE, distance

WHITE, DARK = (0.95, 0.95, 0.95), (0.1, 0.1, 0.1)


def paint(*things, background=WHITE):
    """[3, 64, 64] with shapes placed by hand: (item in words, x, y, radius)."""
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    image = np.broadcast_to(np.array(background)[:, None, None], (3, SIZE, SIZE))
    for words, center_x, center_y, radius in things:
        color, shape = words.split()
        ink = np.clip(0.5 - distance(shape, x - center_x, y - center_y, radius), 0, 1)
        image = image * (1 - ink) + np.array(COLORS[color])[:, None, None] * ink
    return torch.from_numpy(image.astype(np.float32))


def blurred(images, sigma):
    reach = torch.arange(-4, 5.0)
    weight = torch.exp(-(reach**2) / (2 * sigma**2))
    weight = (weight / weight.sum()).expand(3, 1, 1, 9)
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4), mode="replicate")
    rows = torch.nn.functional.conv2d(padded, weight, groups=3)
    return torch.nn.functional.conv2d(rows, weight.transpose(2, 3), groups=3).clamp(0, 1)


def noisy(images):
    return (images + 0.03 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)


def rounded(images):
    return (images * 255).round() / 255
