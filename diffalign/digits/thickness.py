"""Thickness of a stroke: the ink of an image, compared with real images of the same digit."""

import functools

import torch
from torch import Tensor

from .classes import CLASSES
from .grammar import Thickness
from .handwriting import LEVELS, everything


def relative_ink(ink: Tensor, classes: Tensor) -> Tensor:
    """Divide the mean ink of each image by the median of the real images of its class: 1 is the usual stroke.

    Args:
        ink: [K, 8, 8] in [0, 1]
        classes: digit of each image, int64 [K]

    Returns:
        float32 [K], on the CPU.
    """
    return ink.flatten(1).mean(dim=1) / _medians()[classes]


def rank(relative: Tensor) -> Tensor:
    """Share of the real images with less relative ink: [K] -> [K] in [0, 1]."""
    real = _real()
    return torch.searchsorted(real, relative.contiguous()).float() / len(real)


def is_of(thickness: Thickness, relative: Tensor) -> Tensor:
    """True where a relative ink lies in the lower ("thin") or upper ("thick") third of the real images: [K] -> bool [K]."""
    place = rank(relative)
    return place < 1 / 3 if thickness == "thin" else place >= 2 / 3


@functools.cache
def _medians() -> Tensor:
    real = everything()
    mean = real.pixels.float().flatten(1).mean(dim=1) / LEVELS
    return torch.stack([mean[real.labels == digit].median() for digit in CLASSES])


@functools.cache
def _real() -> Tensor:
    """Relative ink of all real images, in rising order."""
    real = everything()
    return relative_ink(real.pixels.float() / LEVELS, real.labels).sort().values
