"""Independent stochastic trajectories."""

from collections.abc import Sequence

import attrs

from diffalign.core import Condition, Outline, Policy, Progress, Streams, TrajectoryBatch, TrajectorySampler
from diffalign.core.number_fields import finite, whole

from .frontier import foreseen, roll_out
from .plans import Branching
from .splits import require_steps


@attrs.frozen
class ChainSampler(TrajectorySampler):
    """Draws K independent chains per prompt, stochastic in a window of steps: a forest that never branches.

    Args:
        steps: denoising steps T
        samples: number K of chains per prompt
        eta: noise level of the window's steps
        window: (first, end): the steps first, ..., end - 1 are stochastic. The default (1, steps - 1) leaves out the first step, where
            FlowSDE is singular, and the last, where no noise is left. `SlidingWindow` and `RandomWindow` are plans of a short window that
            moves (MixGRPO, arXiv:2507.21802).
        rows: network rows per call; None takes all chains at once

    Reference: Flow-GRPO, arXiv:2505.05470.
    """

    steps: int = attrs.field(default=8, validator=whole(3))
    samples: int = attrs.field(default=16, validator=whole(1))
    eta: float = attrs.field(default=0.7, validator=finite(attrs.validators.gt(0)))
    window: Sequence[int] | None = None
    rows: int | None = attrs.field(default=None, validator=attrs.validators.optional(whole(1)))

    def __attrs_post_init__(self) -> None:
        self.branching()

    def branching(self) -> Branching:
        """Branching with K roots, in which no step branches."""
        require_steps("ChainSampler.window", (1, self.steps - 1) if self.window is None else self.window)
        window = (1, self.steps - 1) if self.window is None else tuple(self.window)
        if len(window) != 2 or not 0 <= window[0] < window[1] < self.steps:
            raise ValueError(f"ChainSampler.window must be (first, end) with 0 <= first < end < {self.steps} steps; got {window}")
        levels = [self.eta if window[0] <= step < window[1] else 0.0 for step in range(self.steps)]
        return Branching((1,) * self.steps, tuple(levels), roots=self.samples)

    def outline(self, policy: Policy) -> Outline:
        return foreseen(policy, self.branching())

    def sample(self, policy: Policy, condition: Condition, progress: Progress, streams: Streams) -> TrajectoryBatch:
        return roll_out(policy, condition, self.branching(), streams, self.rows)
