"""Sampler of stochastic trees: K trajectories of a prompt that share their first denoising steps."""

import attrs

from diffalign.core import Condition, Outline, Policy, Progress, Streams, TrajectoryBatch, TrajectorySampler
from diffalign.core.given import require_part
from diffalign.core.number_fields import whole
from diffalign.core.undo import rewind_of

from .fixed_plan import FixedPlan
from .frontier import checked_grid, foreseen, roll_out
from .plans import Branching, Plan, drawn, largest, noise_bound


@attrs.frozen
class TreeSampler(TrajectorySampler):
    """Branches at the steps that a plan gives. The frontier of all prompts is one network call per step.

    Args:
        steps: denoising steps T
        plan: gives the steps that branch; it is drawn anew at every step of the run
        rows: network rows per call; None takes the whole frontier at once
        keep_graph: keep the graph of the stochastic steps, so that the first update of an objective over paths evaluates no network row. A
            3 x 3 x 3 tree in 6 steps then costs 42 + 2 x 13 row-equivalents instead of 42 + 3 x 13. The activations of all these rows stay
            in memory until the update, whatever the objective's row budget is

    Raises:
        ValueError: the plan does not fit the steps, or draws another number of them, at whichever step of the run.

    Reference: TMPO, arXiv:2605.10983.
    """

    steps: int = attrs.field(default=8, validator=whole(2))
    plan: Plan = attrs.field(factory=FixedPlan)
    rows: int | None = attrs.field(default=None, validator=attrs.validators.optional(whole(1)))
    keep_graph: bool = False

    def __attrs_post_init__(self) -> None:
        require_part("TreeSampler.plan", self.plan, Plan)
        rewind = rewind_of(self)
        drawn(self.plan, self.steps, Progress(0, 1), Streams(0))
        rewind(self)
        self.branching()

    def branching(self, progress: Progress | None = None, streams: Streams | None = None) -> Branching:
        """Branching that the plan draws; without arguments, the one of the run that needs the most memory, which moves no state."""
        if progress is not None or streams is not None:
            return drawn(self.plan, self.steps, progress or Progress(0, 1), streams or Streams(0))
        rewind = rewind_of(self)
        most = largest(self.plan, self.steps)
        rewind(self)
        return most

    def outline(self, policy: Policy) -> Outline:
        rewind = rewind_of(self)
        checked_grid(policy, noise_bound(self.plan, self.steps))  # a later draw may reach other steps than the first
        rewind(self)
        return foreseen(policy, self.branching())

    def sample(self, policy: Policy, condition: Condition, progress: Progress, streams: Streams) -> TrajectoryBatch:
        return roll_out(policy, condition, self.branching(progress, streams), streams, self.rows, keep_graph=self.keep_graph)
