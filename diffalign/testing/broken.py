"""Policies that break the first-step contract in one known way, which the contract must find and name."""

from typing import Literal, Self

import torch
from torch import Tensor, nn

from diffalign.core import Condition, Gaussian, Guided, Policy, PolicyAround
from diffalign.core.words import require_word

Fault = Literal["sigma", "adapter", "condition", "cache", "guidance", "dropout", "type", "noise level"]
FAULTS: tuple[Fault, ...] = ("sigma", "adapter", "condition", "cache", "guidance", "dropout", "type", "noise level")


class BrokenReplay(PolicyAround):
    """Policy that is right for a number of network calls, those of one rollout, and wrong afterwards.

        "sigma"        the network sees the sigma one index further on the grid
        "adapter"      the velocity of the policy without its LoRA update
        "condition"    a stale cache: every row has the condition of the first
        "cache"        a stale cache: the velocity of the first call with as many rows, for any latents
        "guidance"     5 % more guidance than the policy, which must be a `Guided`
        "dropout"      one number of ten in the latents is dropped before the network sees them
        "type"         the network computes in bfloat16 (torch.autocast); a policy in half precision stays as it is
        "noise level"  5 % more noise than the step asks for

    Args:
        policy: the right policy
        fault: one of the above
        calls: number of calls that are right
        steps: number of steps of the grid, for the fault "sigma"

    Raises:
        ValueError: the fault is none of these.
    """

    def __init__(self, policy: Policy, fault: Fault, calls: int, steps: int | None = None) -> None:
        super().__init__(policy)
        require_word("BrokenReplay.fault", fault, Fault)
        self.fault, self.calls, self.steps = fault, calls, calls if steps is None else steps
        self._left = calls
        self._kept: dict[int, Tensor] = {}
        self._other = _other(policy, fault)

    @property
    def broken(self) -> bool:
        """True once the right calls are used up."""
        return self._left <= 0

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        if not self.broken:
            self._left -= 1
            velocity = self.policy.velocity(latents, sigma, condition)
            self._kept.setdefault(len(latents), velocity.detach())
            return velocity
        match self.fault:
            case "sigma":
                grid = self.policy.sigmas(self.steps).to(sigma)
                index = (grid[None] - sigma[:, None]).abs().argmin(dim=1)
                sigma = grid[(index + 1).clamp(max=self.steps - 1)]
            case "condition":
                condition = condition.select(torch.zeros(len(condition), dtype=torch.long))
            case "cache" if len(latents) in self._kept:
                return self._kept[len(latents)]
            case "dropout":
                latents = nn.functional.dropout(latents, 0.1)
            case "type" if self.policy.precision == torch.float32:
                with torch.autocast(latents.device.type, torch.bfloat16):
                    return self.policy.velocity(latents, sigma, condition).to(latents.dtype)
        return self._other.velocity(latents, sigma, condition)

    def transition(self, latents: Tensor, sigma: Tensor, sigma_next: Tensor, condition: Condition, noise_level: Tensor) -> Gaussian:
        broken = self.broken  # the call itself may be the last right one
        velocity = self.velocity(latents, sigma, condition)
        more = 1.05 if broken and self.fault == "noise level" else 1.0
        return self.kernel.step(latents, velocity, sigma, sigma_next, noise_level * more)

    def fork(self, *, trainable: bool = False, pristine: bool = False) -> Self:
        return type(self)(self.policy.fork(trainable=trainable, pristine=pristine), self.fault, self.calls, self.steps)


def _other(policy: Policy, fault: Fault) -> Policy:
    """The policy that answers once the right calls are used up."""
    if fault == "adapter":
        return policy.fork(pristine=True)
    if fault == "guidance":
        if not isinstance(policy, Guided):
            raise ValueError(f"the fault 'guidance' needs a Guided policy; got {type(policy).__name__}")
        return policy.scaled(1.05 * policy.scale)
    return policy
