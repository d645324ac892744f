"""Plan whose splits move with the progress of the run."""

from collections.abc import Sequence
from itertools import pairwise

import attrs

from diffalign.core import Progress, Streams
from diffalign.core.number_fields import finite, whole

from .plans import Branching, Plan
from .splits import branching_at, move_apart, noise_within, per_split, require_steps


@attrs.frozen
class ProgressPlan(Plan):
    """Splits that move during the run from early steps (much noise: layout) to late ones (little noise: detail).

        m_j = early_j + (late_j - early_j) progress, inside [first, last],   last = steps - 1 - tail_guard
        z_j ~ Beta(kappa u_j, kappa (1 - u_j)),   u_j = (m_j - first) / (last - first)
        s_j = round(first + (last - first) z_j),  or round(m_j) with kappa = 0

    Then the splits are sorted and moved apart: to the right until they are `min_gap` apart, and back to the left if the last ones would
    pass `last`. So all draws have equally many levels and leaves. If that is impossible, building the sampler fails. Draws come from the
    step's streams and are equal in all processes.

    Args:
        early: step of each split at the start of the run
        late: step of each split at its end
        branches: children of each split
        eta: noise level of the splits, one number or one per split, first to last
        concentration: kappa of the Beta distribution; a larger kappa stays closer to m_j, 0 means exactly m_j
        tail_guard: number of last steps that never split; at least 1, because the last step has no noise
        min_gap: least distance of two splits
        first: first step that may split; FlowSDE is singular at step 0
        roots: independent initial noises per prompt
        levels: number of splits that branch, the first ones; the other splits are stochastic with one child. None lets all branch
        max_leaves: largest number of finished samples per prompt; the last levels do not branch if this is needed to stay below it
        promote_roots: replace a first split at step 0 or 1 by `branches` times as many roots; the number of leaves stays the same

    Raises:
        ValueError: a number is out of range, or the splits do not fit the steps.

    Reference: TMPO, arXiv:2605.10983.
    """

    early: Sequence[int] = (1, 2, 3)
    late: Sequence[int] = (1, 3, 5)
    branches: int = attrs.field(default=3, validator=whole(2))
    eta: float | Sequence[float] = 0.7
    concentration: float = attrs.field(default=6.0, validator=finite(attrs.validators.ge(0)))
    tail_guard: int = attrs.field(default=1, validator=whole(1))
    min_gap: int = attrs.field(default=1, validator=whole(1))
    first: int = attrs.field(default=1, validator=whole(0))
    roots: int = attrs.field(default=1, validator=whole(1))
    levels: int | None = attrs.field(default=None, validator=attrs.validators.optional(whole(0)))
    max_leaves: int | None = attrs.field(default=None, validator=attrs.validators.optional(whole(1)))
    promote_roots: bool = False

    def __attrs_post_init__(self) -> None:
        require_steps("ProgressPlan.early", self.early)
        require_steps("ProgressPlan.late", self.late)
        if not self.early or len(self.early) != len(self.late):
            raise ValueError(
                f"ProgressPlan.early and late must name one step per split each, at least one; got {list(self.early)} and {list(self.late)}"
            )
        for name, splits in {"early": self.early, "late": self.late}.items():
            if any(later < earlier for earlier, later in pairwise(splits)):
                raise ValueError(f"ProgressPlan.{name} must not decrease; got {list(splits)}")
        per_split(self.eta, len(self.early), "ProgressPlan")

    def largest(self, steps: int) -> Branching:
        earliest = [float(self.first)] * len(self.early)
        return self._branching(steps, earliest if self.concentration else [*map(min, self._means(steps, 0.0), self._means(steps, 1.0))])

    def largest_noise(self, steps: int) -> tuple[float, ...]:
        last, eta = steps - 1 - self.tail_guard, max(per_split(self.eta, len(self.early), "ProgressPlan"))
        if not self.concentration:  # splits go from their early to their late step and draw nothing
            ends = [move_apart("ProgressPlan", self._means(steps, place), self.first, last, self.min_gap) for place in (0.0, 1.0)]
            earliest = self.draw(steps, Progress(int(ends[1][0] < ends[0][0]), 2), Streams(0))
            return noise_within(earliest, min(ends[0][0], ends[1][0]), max(ends[0][-1], ends[1][-1]), eta)
        return noise_within(self.largest(steps), self.first, last, eta)

    def draw(self, steps: int, progress: Progress, streams: Streams) -> Branching:
        outside = [split for split in (*self.early, *self.late) if not 0 <= split < steps]
        if outside:
            raise ValueError(f"ProgressPlan.early and late must be steps of the rollout, 0 to {steps - 1}; got {outside[0]}")
        last, positions = steps - 1 - self.tail_guard, self._means(steps, progress.fraction)
        if self.concentration and last > self.first:
            generator = streams.generator("plan")
            shares = [min(max((position - self.first) / (last - self.first), 1e-3), 1 - 1e-3) for position in positions]
            kappa = self.concentration
            positions = [self.first + (last - self.first) * generator.beta(kappa * share, kappa * (1 - share)) for share in shares]
        return self._branching(steps, positions)

    def _means(self, steps: int, fraction: float) -> list[float]:
        means = (early + (late - early) * fraction for early, late in zip(self.early, self.late, strict=True))
        return [min(max(mean, float(self.first)), float(steps - 1 - self.tail_guard)) for mean in means]

    def _branching(self, steps: int, positions: Sequence[float]) -> Branching:
        splits = move_apart("ProgressPlan", positions, self.first, steps - 1 - self.tail_guard, self.min_gap)
        etas = per_split(self.eta, len(splits), "ProgressPlan")
        return branching_at(
            "ProgressPlan", steps, splits, etas, self.branches, self.roots, self.levels, self.max_leaves, self.promote_roots
        )
