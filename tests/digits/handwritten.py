"""Real pictures for the tests: large images of known digits, as a policy would draw them."""

import torch
from torch.nn import functional as F

from diffalign.core import Prompt
from diffalign.digits import split


def real(digits, size=64):
    """Images [K, 3, size, size], each the first held-out picture of its digit that was not taken yet."""
    _, held_out = split()
    taken = {digit: iter((held_out.labels == digit).nonzero().flatten().tolist()) for digit in set(digits)}
    index = torch.tensor([next(taken[digit]) for digit in digits])
    return F.interpolate(held_out.images[index], size=(size, size), mode="nearest")


def prompts(*texts):
    return [Prompt(text) for text in texts]
