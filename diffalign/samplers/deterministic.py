"""Deterministic trajectories: the flow's ODE by Euler steps, or by a solver of a higher order."""

import attrs

from diffalign.core import Condition, Outline, Policy, Progress, Streams, TrajectoryBatch, TrajectorySampler
from diffalign.core.number_fields import whole

from .frontier import draw_ends, foreseen, roll_out
from .plans import Branching
from .solvers import Solver


@attrs.frozen
class DeterministicSampler(TrajectorySampler):
    """Draws K deterministic trajectories per prompt from independent noises.

    By Euler steps, it stores every level. With a solver it stores the ends alone, for objectives that need only finished samples: no edge
    is a step of the policy, so there is no replay, and the first-step contract has nothing to check.

    Args:
        steps: denoising steps T
        samples: number K of trajectories per prompt; objectives that compare the samples of a prompt need at least 2
        rows: network rows per call; None takes all at once
        solver: `Heun`, `Midpoint`, `AdamsBashforth` or `DPMSolver`; None takes Euler steps. A solver may take several network evaluations
            of a step: rows and calls of `diffalign check` count them

    Raises:
        ValueError: a solver is given and the policy is a few-step student, whose weights know Euler steps alone.
    """

    steps: int = attrs.field(default=28, validator=whole(1))
    samples: int = attrs.field(default=16, validator=whole(1))
    rows: int | None = attrs.field(default=None, validator=attrs.validators.optional(whole(1)))
    solver: Solver | None = None

    def branching(self) -> Branching:
        """Branching with K roots and no noise."""
        evaluations = None if self.solver is None else self.solver.evaluations(self.steps)
        return Branching((1,) * self.steps, (0.0,) * self.steps, roots=self.samples, evaluations=evaluations)

    def outline(self, policy: Policy) -> Outline:
        self._require_solvable(policy)
        return foreseen(policy, self.branching())

    def sample(self, policy: Policy, condition: Condition, progress: Progress, streams: Streams) -> TrajectoryBatch:
        self._require_solvable(policy)
        if self.solver is None:
            return roll_out(policy, condition, self.branching(), streams, self.rows, keep_all=True)
        return draw_ends(policy, condition, self.branching(), self.solver, streams, self.rows)

    def _require_solvable(self, policy: Policy) -> None:
        if self.solver is not None and policy.step_counts:
            raise ValueError(
                f"DeterministicSampler.solver must be None for a few-step student, which is trained for Euler steps from level to level; "
                f"got {self.solver}. Leave it out, or roll out by a policy of many steps."
            )
