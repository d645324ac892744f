"""Judge: a classifier that gives the digit of an image and its probability."""

import functools
from pathlib import Path

import attrs
import torch
from safetensors.torch import load_file
from torch import Tensor

from .networks import JudgeNetwork
from .reading import ink_of

FILE = Path(__file__).parent / "model" / "judge.safetensors"

SURE = 0.8
"""Probability above which an image counts as a digit."""


@attrs.frozen(eq=False)
class Sight:
    """Result of the judge for some images, on the CPU.

    Args:
        ink: [K, 8, 8] in [0, 1]
        probabilities: probabilities of the digits, float32 [K, 10]
    """

    ink: Tensor
    probabilities: Tensor

    @property
    def classes(self) -> Tensor:
        """Most probable digit of each image: int64 [K]."""
        return self.probabilities.argmax(dim=1)

    @property
    def sure(self) -> Tensor:
        """True where that digit has a probability above `SURE`: bool [K]."""
        return self.probabilities.amax(dim=1) > SURE


@torch.no_grad()
def look(images: Tensor) -> Sight:
    """Judge images. The network is loaded once and always works on the CPU.

    Args:
        images: [K, 3, H, W] in [0, 1]

    Raises:
        ValueError: other images, as in `ink_of`.
    """
    ink = ink_of(images)
    return Sight(ink, _network()(ink.unsqueeze(1) * 2 - 1).softmax(dim=1))


def probabilities(images: Tensor) -> Tensor:
    """Compute the probabilities of the ten digits: [K, 3, H, W] in [0, 1] -> float32 [K, 10], on the device of the images.

    Raises:
        ValueError: other images, as in `ink_of`.
    """
    return look(images).probabilities.to(images.device)


@functools.cache
def _network() -> JudgeNetwork:
    network = JudgeNetwork()
    network.load_state_dict({name: tensor.float() for name, tensor in load_file(FILE).items()})
    return network.eval().requires_grad_(False)
