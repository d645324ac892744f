"""Plan that never changes."""

from collections.abc import Sequence

import attrs

from diffalign.core import Progress, Streams
from diffalign.core.number_fields import whole

from .plans import Branching, Plan
from .splits import branching_at, per_split, require_steps


@attrs.frozen
class FixedPlan(Plan):
    """Plan with the same splits at every step of the run.

    Args:
        splits: denoising steps that branch, strictly increasing, inside [0, steps - 1); the last step has no noise
        branches: children of each split
        eta: noise level of the splits, one number or one per split
        roots: independent initial noises per prompt
        levels: number of splits that branch, the first ones; the other splits are stochastic with one child. None lets all branch
        max_leaves: largest number of finished samples per prompt; the last levels do not branch if this is needed to stay below it
        promote_roots: replace a first split at step 0 or 1 by `branches` times as many roots

    Raises:
        ValueError: the splits do not increase or do not fit the steps, or options contradict each other.
    """

    splits: Sequence[int] = (1, 2, 3)
    branches: int = attrs.field(default=3, validator=whole(2))
    eta: float | Sequence[float] = 0.7
    roots: int = attrs.field(default=1, validator=whole(1))
    levels: int | None = attrs.field(default=None, validator=attrs.validators.optional(whole(0)))
    max_leaves: int | None = attrs.field(default=None, validator=attrs.validators.optional(whole(1)))
    promote_roots: bool = False

    def __attrs_post_init__(self) -> None:
        require_steps("FixedPlan.splits", self.splits)
        if not self.splits:
            raise ValueError("FixedPlan.splits must name at least one step; got none. For independent samples use ChainSampler.")
        if any(later <= earlier for earlier, later in zip(self.splits, self.splits[1:], strict=False)):
            raise ValueError(f"FixedPlan.splits must increase strictly, because each is a level of the tree; got {list(self.splits)}")
        per_split(self.eta, len(self.splits), "FixedPlan")

    def draw(self, steps: int, progress: Progress, streams: Streams) -> Branching:
        if self.splits[0] < 0 or self.splits[-1] > steps - 2:
            raise ValueError(
                f"FixedPlan.splits must lie in [0, {steps - 2}] for {steps} steps (the last step ends at sigma 0, where no noise is left); "
                f"got {list(self.splits)}"
            )
        etas = per_split(self.eta, len(self.splits), "FixedPlan")
        promote = self.promote_roots and self.splits[0] <= 1
        return branching_at("FixedPlan", steps, self.splits, etas, self.branches, self.roots, self.levels, self.max_leaves, promote)
