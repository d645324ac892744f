"""Classifier-free guidance."""

from collections.abc import Callable
from typing import Self

import attrs
import torch
from torch import Tensor

from .forking import view_of
from .policy import Policy
from .types import Condition
from .wrapper import PolicyAround


@attrs.frozen(eq=False)
class Guidance:
    """Guidance of a policy's velocity: the scale, and the negative text as its family encodes it.

    Args:
        scale: scale for the policy's own rule (`Policy.guide`)
        null: encoded negative text, one row; None if the scale is the policy's `no_guidance`, so that no text is needed
    """

    scale: float
    null: Condition | None

    @classmethod
    def of(cls, policy: Policy, scale: float, negative: str) -> Self:
        """Encode the negative text if `scale` means guidance."""
        if scale == policy.no_guidance:
            return cls(scale, None)
        with torch.no_grad():
            return cls(scale, policy.encode_negative(negative))

    def velocities(self, policy: Policy, latents: Tensor, sigma: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """Velocity of the policy and its guided form, each [B, *]. Without guidance both are one tensor, and a sample costs one row."""
        positive = policy.velocity(latents, sigma, condition)
        if self.null is None:
            return positive, positive
        null = self.null.select(torch.zeros(len(condition), dtype=torch.long))
        return positive, policy.guide(positive, policy.velocity(latents, sigma, null), self.scale)


class Guided(PolicyAround):
    """Classifier-free guidance as a policy; a sample costs two network rows.

    Args:
        policy: the policy that is guided; its own rule combines the two velocities
        scale: scale for that rule; the policy's `no_guidance` (1; for Z-Image 0) switches guidance off and costs no second row
        negative: the negative prompt, encoded once

    Reference: Ho and Salimans, arXiv:2207.12598.
    """

    def __init__(self, policy: Policy, scale: float, negative: str = "") -> None:
        super().__init__(policy)
        self.scale = scale
        self.negative = negative
        self._guidance = Guidance.of(policy, scale, negative)

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        return self._guidance.velocities(self.policy, latents, sigma, condition)[1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        moved = super()._apply(fn, recurse)
        self._guidance = Guidance.of(self.policy, self.scale, self.negative)  # the null condition lies where the policy was
        return moved

    def scaled(self, scale: float) -> Self:
        """View of the same policy with another scale; not a fork."""
        return view_of(self, scale=scale, _guidance=Guidance.of(self.policy, scale, self.negative))

    def at(self, steps: int) -> Policy:
        inner = self.policy.at(steps)  # the null condition may depend on the number of steps, so it is encoded again
        if inner is self.policy:
            return self
        return view_of(self, policy=inner, _guidance=Guidance.of(inner, self.scale, self.negative))

    def fork(self, *, trainable: bool = False, pristine: bool = False) -> Self:
        return type(self)(self.policy.fork(trainable=trainable, pristine=pristine), self.scale, self.negative)


def evaluations(policy: Policy) -> int:
    """Network rows for one row of the policy: two under guidance."""
    count = 1
    while isinstance(policy, PolicyAround):
        count *= 2 if isinstance(policy, Guided) and policy.scale != policy.no_guidance else 1
        policy = policy.policy
    return count
