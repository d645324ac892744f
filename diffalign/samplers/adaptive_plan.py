"""Plan whose splits follow the reward."""

from collections.abc import Sequence

import attrs

from diffalign.core import Progress, Streams
from diffalign.core.number_fields import finite, is_finite, require_number, whole

from .plans import Branching, Plan
from .splits import branching_at, move_apart, noise_within, per_split


@attrs.frozen
class AdaptivePlan(Plan):
    """Splits that follow the reward. A low reward splits early, where noise decides the layout; a high one late, where it decides details.

        a   = (reward - low) / (high - low), inside [0, 1];   reward: the raw mean of the step before, over all processes
        z_j ~ Beta(1 + kappa a, 1 + kappa (1 - a)), sorted
        s_j = round(first + (last - first) z_j),   last = steps - 1 - tail_guard
        eta_j = min(eta_j (low_factor + (high_factor - low_factor) a), eta_max)

    Then the splits are moved apart as in `ProgressPlan`, so that all draws have equally many levels and leaves. At the first step there
    is no reward yet: the splits are evenly spaced, s_j = j (steps // (splits + 1)), with a = 1/2.

    The range of rewards is given, not learned. A running range or mean would be state that a resumed run must restore, and it would
    follow the reward until the position in the range means nothing. Take the mean reward of the policy before training
    (`diffalign evaluate`) as `low`, and the reward that the run should reach as `high`.

    Args:
        low: mean reward at which splits are earliest
        high: mean reward at which splits are latest
        splits: number of splits
        branches: children of each split
        eta: noise level of the splits, one number or one per split, first to last
        eta_factors: factor of eta at `low` and at `high`; the authors' release takes (1.3, 0.8)
        eta_max: upper limit of eta_j; CPS allows at most 1
        concentration: kappa of the Beta distribution; with a larger kappa the splits depend more on the reward, with 0 not at all
        tail_guard: number of last steps that never split; at least 1, because the last step has no noise
        min_gap: least distance of two splits
        first: first step that may split; FlowSDE is singular at step 0
        roots: independent initial noises per prompt
        levels: number of splits that branch, the first ones; the other splits are stochastic with one child. None lets all branch
        max_leaves: largest number of finished samples per prompt; the last levels do not branch if this is needed to stay below it
        promote_roots: replace a first split at step 0 or 1 by `branches` times as many roots; the number of leaves stays the same

    Raises:
        ValueError: a number is out of range, or the splits do not fit the steps.

    Reference: TMPO, arXiv:2605.10983. The released code splits late for a low reward, which is the opposite of what the paper says.
    """

    low: float
    high: float
    splits: int = attrs.field(default=3, validator=whole(1))
    branches: int = attrs.field(default=3, validator=whole(2))
    eta: float | Sequence[float] = 0.7
    eta_factors: Sequence[float] = (1.0, 1.0)
    eta_max: float = attrs.field(default=1.0, validator=finite(attrs.validators.gt(0)))
    concentration: float = attrs.field(default=4.0, validator=finite(attrs.validators.ge(0)))
    tail_guard: int = attrs.field(default=1, validator=whole(1))
    min_gap: int = attrs.field(default=1, validator=whole(1))
    first: int = attrs.field(default=1, validator=whole(0))
    roots: int = attrs.field(default=1, validator=whole(1))
    levels: int | None = attrs.field(default=None, validator=attrs.validators.optional(whole(0)))
    max_leaves: int | None = attrs.field(default=None, validator=attrs.validators.optional(whole(1)))
    promote_roots: bool = False

    def __attrs_post_init__(self) -> None:
        require_number("AdaptivePlan.low", self.low)
        require_number("AdaptivePlan.high", self.high)
        if not self.low < self.high:
            raise ValueError(f"AdaptivePlan.low must be below high, both in units of the raw reward; got {self.low:g} and {self.high:g}")
        if not isinstance(self.eta_factors, Sequence) or len(self.eta_factors) != 2 or not all(map(is_finite, self.eta_factors)):
            raise ValueError(f"AdaptivePlan.eta_factors must be two positive numbers, at low and at high; got {self.eta_factors!r}")
        if min(self.eta_factors) <= 0:
            raise ValueError(f"AdaptivePlan.eta_factors must be two positive numbers, at low and at high; got {list(self.eta_factors)}")
        if max(per_split(self.eta, self.splits, "AdaptivePlan")) > self.eta_max:
            raise ValueError(f"AdaptivePlan.eta must be at most eta_max, {self.eta_max:g}; got {self.eta}")

    def largest(self, steps: int) -> Branching:
        return self._branching(steps, [float(self.first)] * self.splits, 0.5)

    def largest_noise(self, steps: int) -> tuple[float, ...]:
        etas = self._etas(self.eta_factors.index(max(self.eta_factors)))
        return noise_within(self.largest(steps), self.first, steps - 1 - self.tail_guard, max(etas))

    def draw(self, steps: int, progress: Progress, streams: Streams) -> Branching:
        first, last = self.first, steps - 1 - self.tail_guard
        if progress.reward is None:
            place = 0.5
            positions = [float((index + 1) * (steps // (self.splits + 1))) for index in range(self.splits)]
        else:
            place = min(max((progress.reward - self.low) / (self.high - self.low), 0.0), 1.0)
            generator = streams.generator("plan")
            early, late = 1 + self.concentration * place, 1 + self.concentration * (1 - place)
            positions = [first + (last - first) * generator.beta(early, late) for _ in range(self.splits)]
        return self._branching(steps, positions, place)

    def _etas(self, place: float) -> list[float]:
        """Noise level of each split, at a place in the range of rewards."""
        factor = self.eta_factors[0] + (self.eta_factors[1] - self.eta_factors[0]) * place
        return [min(eta * factor, self.eta_max) for eta in per_split(self.eta, self.splits, "AdaptivePlan")]

    def _branching(self, steps: int, positions: Sequence[float], place: float) -> Branching:
        splits = move_apart("AdaptivePlan", positions, self.first, steps - 1 - self.tail_guard, self.min_gap)
        return branching_at(
            "AdaptivePlan", steps, splits, self._etas(place), self.branches, self.roots, self.levels, self.max_leaves, self.promote_roots
        )
