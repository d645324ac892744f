"""A taste on ShapeWorld: something that every prompt leaves open."""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.core import Prompt, Reward
from diffalign.shapeworld.recognition import find_objects
from diffalign.shapeworld.render import SIZE


class UpperHalf(Reward):
    """1 if the middle of all objects lies in the upper half of the picture, else 0; 0 for a picture without objects.

    No caption says where things stand, so the base does what is rewarded in about half of its pictures, whatever is asked.
    """

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        found = find_objects(images)
        return torch.tensor([float(bool(items) and sum(item.y for item in items) / len(items) < SIZE / 2) for items in found])
