"""The real pictures: 1,797 handwritten digits of 8 x 8 pixels, which ship with the package."""

import functools
import random
from pathlib import Path

import attrs
import torch
from safetensors.torch import load_file
from torch import Tensor

FILE = Path(__file__).parent / "data" / "digits.safetensors"
"""The pictures and their labels; where they come from stands in the README beside it."""

SIDE = 8
"""Pixels."""

LEVELS = 16
"""The value of full ink; 0 is paper."""

HELD_OUT = 360
"""Pictures that neither the flow nor the judge was trained on."""


@attrs.frozen(eq=False)
class Handwriting:
    """Some real pictures.

    Args:
        pixels: ink from 0 to 16, uint8 [N, 8, 8]
        labels: the digit that was meant, int64 [N]
    """

    pixels: Tensor
    labels: Tensor

    @property
    def latents(self) -> Tensor:
        """As the flow sees them: float32 [N, 1, 8, 8] from -1 (paper) to 1 (ink)."""
        return self.pixels.float().unsqueeze(1) / (LEVELS / 2) - 1

    @property
    def images(self) -> Tensor:
        """As a reward sees them: float32 [N, 3, 8, 8] in [0, 1], ink is white."""
        return (self.pixels.float().unsqueeze(1) / LEVELS).expand(-1, 3, -1, -1)

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, index: Tensor) -> "Handwriting":
        """The pictures of an index [M]."""
        return Handwriting(self.pixels[index], self.labels[index])


@functools.cache
def everything() -> Handwriting:
    """All 1,797 pictures, in the order of the source."""
    tensors = load_file(FILE)
    return Handwriting(tensors["pixels"], tensors["labels"].long())


@functools.cache
def split() -> tuple[Handwriting, Handwriting]:
    """The 1,437 pictures to train on and the 360 held out, by a fixed shuffle."""
    order = list(range(len(everything())))
    random.Random("digits split").shuffle(order)
    index = torch.tensor(order)
    return everything().select(index[HELD_OUT:]), everything().select(index[:HELD_OUT])
