"""Real images: 1,797 handwritten digits of 8 x 8 pixels, which ship with the package."""

import functools
import random
from pathlib import Path

import attrs
import torch
from safetensors.torch import load_file
from torch import Tensor

FILE = Path(__file__).parent / "data" / "digits.safetensors"
"""File with the images and their labels; the README beside it names the source."""

SIDE = 8
"""Height and width of an image in pixels."""

LEVELS = 16
"""Value of full ink; 0 is paper."""

HELD_OUT = 360
"""Number of images on which neither the flow nor the judge was trained."""


@attrs.frozen(eq=False)
class Handwriting:
    """Set of real images.

    Args:
        pixels: ink from 0 to 16, uint8 [N, 8, 8]
        labels: digit of each image, int64 [N]
    """

    pixels: Tensor
    labels: Tensor

    @property
    def latents(self) -> Tensor:
        """Latents for the flow: float32 [N, 1, 8, 8] from -1 (paper) to 1 (ink)."""
        return self.pixels.float().unsqueeze(1) / (LEVELS / 2) - 1

    @property
    def images(self) -> Tensor:
        """Images for a reward: float32 [N, 3, 8, 8] in [0, 1], ink is white."""
        return (self.pixels.float().unsqueeze(1) / LEVELS).expand(-1, 3, -1, -1)

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, index: Tensor) -> "Handwriting":
        """Select the images of an index [M]."""
        return Handwriting(self.pixels[index], self.labels[index])


@functools.cache
def everything() -> Handwriting:
    """Load all 1,797 images, in the order of the source."""
    tensors = load_file(FILE)
    return Handwriting(tensors["pixels"], tensors["labels"].long())


@functools.cache
def split() -> tuple[Handwriting, Handwriting]:
    """Split the images into 1,437 for training and 360 held out, by a fixed shuffle."""
    order = list(range(len(everything())))
    random.Random("digits split").shuffle(order)
    index = torch.tensor(order)
    return everything().select(index[HELD_OUT:]), everything().select(index[:HELD_OUT])
