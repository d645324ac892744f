"""How thick a stroke is: the ink of a picture, compared with real pictures of the same digit."""

import functools

import torch
from torch import Tensor

from .classes import CLASSES
from .grammar import Thickness
from .handwriting import LEVELS, everything


def relative_ink(ink: Tensor, classes: Tensor) -> Tensor:
    """The mean ink of each picture over the median of the real pictures of its class: 1 is the usual stroke.

    Args:
        ink: [K, 8, 8] in [0, 1]
        classes: the digit of each, int64 [K]

    Returns:
        float32 [K], on the CPU.
    """
    return ink.flatten(1).mean(dim=1) / _medians()[classes]


def rank(relative: Tensor) -> Tensor:
    """The share of the real pictures whose relative ink is smaller: [K] -> [K] in [0, 1]."""
    real = _real()
    return torch.searchsorted(real, relative.contiguous()).float() / len(real)


def is_of(thickness: Thickness, relative: Tensor) -> Tensor:
    """Whether a relative ink lies in the lower ("thin") or upper ("thick") third of that of the real pictures: [K] -> bool [K]."""
    place = rank(relative)
    return place < 1 / 3 if thickness == "thin" else place >= 2 / 3


@functools.cache
def _medians() -> Tensor:
    real = everything()
    mean = real.pixels.float().flatten(1).mean(dim=1) / LEVELS
    return torch.stack([mean[real.labels == digit].median() for digit in CLASSES])


@functools.cache
def _real() -> Tensor:
    """The relative ink of all real pictures, rising."""
    real = everything()
    return relative_ink(real.pixels.float() / LEVELS, real.labels).sort().values
