"""An average of the weights for evaluation and export."""

import attrs
import torch

from .policy import Policy


@attrs.define(eq=False)
class Average:
    """Exponential moving average of a policy's own weights.

        d_n = min((1 + n) / (10 + n), decay),   average <- d_n average + (1 - d_n) weights

    Args:
        decay: largest decay
        every: steps between updates
    """

    decay: float = attrs.field(default=0.9, validator=[attrs.validators.ge(0), attrs.validators.lt(1)])
    every: int = attrs.field(default=1, validator=attrs.validators.ge(1))
    policy: Policy | None = attrs.field(default=None, init=False)

    def start(self, policy: Policy) -> None:
        """Fork the weights as they are."""
        self.policy = policy.fork()

    @torch.no_grad()
    def update(self, policy: Policy, step: int) -> None:
        """After step number `step` (from 0)."""
        if self.policy is not None and (step + 1) % self.every == 0:
            self.policy.lerp_(policy, 1 - min((1 + step) / (10 + step), self.decay))
