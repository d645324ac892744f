"""Classifier-free guidance."""

from typing import Self

import torch
from torch import Tensor

from .forking import view_of
from .policy import Policy
from .types import Condition
from .wrapper import PolicyAround


class Guided(PolicyAround):
    """Classifier-free guidance as a policy: two network rows a sample.

    Args:
        policy: the policy that is guided; its own rule combines the two velocities
        scale: 1 is no guidance
        negative: the negative prompt, encoded once

    Reference: Ho and Salimans, arXiv:2207.12598.
    """

    def __init__(self, policy: Policy, scale: float, negative: str = "") -> None:
        super().__init__(policy)
        self.scale = scale
        self.negative = negative
        self._null = policy.encode_negative(negative)

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        null = self._null.select(torch.zeros(len(condition), dtype=torch.long))
        positive = self.policy.velocity(latents, sigma, condition)
        return self.policy.guide(positive, self.policy.velocity(latents, sigma, null), self.scale)

    def at(self, steps: int) -> Policy:
        inner = self.policy.at(steps)  # the null condition may say how many steps there are, too
        return self if inner is self.policy else view_of(self, policy=inner, _null=inner.encode_negative(self.negative))

    def fork(self, *, trainable: bool = False, pristine: bool = False) -> Self:
        return type(self)(self.policy.fork(trainable=trainable, pristine=pristine), self.scale, self.negative)
