"""Moving average of the weights, for evaluation and export."""

import attrs

from .following import Follower
from .policy import Policy
from .schedule import Scalar
from .types import Progress


@attrs.frozen
class _WarmUp(Scalar):
    """Decay min((1 + n) / (10 + n), limit) at step n. It is small at first, so the average soon forgets the first weights."""

    limit: float

    def __call__(self, progress: Progress) -> float:
        return min((1 + progress.step) / (10 + progress.step), self.limit)


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

    def update(self, policy: Policy, step: int) -> None:
        """Move the average towards the policy, after the step of number `step` (the first is 0)."""
        if self.policy is not None:
            now = Progress(step, step + 1)  # the warm-up counts steps and does not look at the run's length
            Follower(_WarmUp(self.decay), self.every).move(self.policy, policy, now)
