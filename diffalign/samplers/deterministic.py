"""Deterministic trajectories: the flow's ODE by Euler steps."""

import attrs

from diffalign.core import Condition, Policy, Progress, Streams, TrajectoryBatch, TrajectorySampler

from .frontier import roll_out
from .plans import Branching


@attrs.frozen
class DeterministicSampler(TrajectorySampler):
    """Draws K deterministic trajectories per prompt from independent noises, and stores every level.

    Args:
        steps: denoising steps T
        samples: number K of trajectories per prompt
        rows: network rows per call; None takes all at once
    """

    steps: int = attrs.field(default=28, validator=attrs.validators.ge(1))
    samples: int = attrs.field(default=1, validator=attrs.validators.ge(1))
    rows: int | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.ge(1)))

    def branching(self) -> Branching:
        """Branching with K roots and no noise."""
        return Branching((1,) * self.steps, (0.0,) * self.steps, roots=self.samples)

    def sample(self, policy: Policy, condition: Condition, progress: Progress, streams: Streams) -> TrajectoryBatch:
        return roll_out(policy, condition, self.branching(), streams, self.rows, keep_all=True)
