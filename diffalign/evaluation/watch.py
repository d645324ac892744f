"""Has a noisy series moved since it began? The statistic behind the alarm."""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import attrs


@attrs.frozen
class Move:
    """The mean of the steps from a cut on against that of all steps before.

    Args:
        before, now: the two means
        errors: (now - before) in standard errors; a normal deviate, whatever the noise was estimated from
        cut: steps before
    """

    before: float
    now: float
    errors: float
    cut: int

    def __str__(self) -> str:
        verb = "rose" if self.now > self.before else "fell"
        return f"{verb} from {self.before:.3f} to {self.now:.3f} ({self.errors:+.1f} standard errors)"


@attrs.frozen
class Series:
    """One number a step, and what is known of its noise.

        move(k) = (mean of y_k+1 .. y_n - mean of y_1 .. y_k) / (s sqrt(1 / k + 1 / (n - k)))

    with s^2 a step's variance. Neighbours estimate it by `mean of (y_i+1 - y_i)^2 / 2`, in which a slow trend counts little. Where the
    variance between the prompt groups within a step is known, which is precise after few steps, s^2 is that, or what neighbours before the
    cut say if it is more: steps may differ by more than their groups do, but a fall is no noise. A move of nu degrees of freedom, t, is
    given as the normal deviate of about the same probability (Wallace):

        (8 nu + 1) / (8 nu + 3) sqrt(nu ln(1 + t^2 / nu)),    nu = 2 (n - 1)^2 / (3 n - 4) of neighbours, sum of (groups - 1) of groups

    Args:
        values: y, [n]
        variances: of each value, from within its step, with its degrees of freedom; of some steps or none

    Reference: D. L. Wallace, Bounds on normal approximations to Student's and the chi-square distributions, 1959.
    """

    values: Sequence[float]
    variances: Sequence[tuple[float, int]] = ()

    @classmethod
    def held_out(cls, lines: Sequence[Mapping[str, Any]], name: str) -> "Series":
        """A held-out reward, from lines of `watch.jsonl`."""
        variances = [(line["errors"][name] ** 2, line["groups"] - 1) for line in lines if line.get("groups", 1) > 1]
        return cls([line["held_out"][name] for line in lines], variances)

    def moved(self, cut: int) -> Move:
        """The move at a cut, 1 <= cut < n."""
        return self._moves([cut])[0]

    def fallen(self, window: int) -> Move | None:
        """The cut at which it fell most clearly, with `window` steps or more on both sides; None while there are fewer than two windows."""
        if len(self.values) < 2 * window:
            return None
        return min(self._moves(range(window, len(self.values) - window + 1)), key=lambda move: move.errors)

    def _moves(self, cuts: Sequence[int]) -> list[Move]:
        count, sums = len(self.values), [0.0, *accumulate(self.values)]
        squares = [0.0, *accumulate((after - first) ** 2 / 2 for first, after in pairwise(self.values))]
        freedom: float = sum(groups for _, groups in self.variances)
        known = sum(variance * groups for variance, groups in self.variances) / freedom if freedom else None
        neighbours, few = squares[-1] / (count - 1), 2 * (count - 1) ** 2 / (3 * count - 4)
        moves = []
        for cut in cuts:
            before, now = sums[cut] / cut, (sums[count] - sums[cut]) / (count - cut)
            noise = neighbours if known is None else max(known, squares[cut - 1] / max(cut - 1, 1))
            errors = _deviate(now - before, noise * (1 / cut + 1 / (count - cut)), few if known is None else freedom)
            moves.append(Move(before, now, errors, cut))
        return moves


def _deviate(difference: float, variance: float, freedom: float) -> float:
    if abs(difference) < 1e-12:  # of sums of equal numbers
        return 0.0
    if variance == 0:
        return math.copysign(math.inf, difference)
    size = (8 * freedom + 1) / (8 * freedom + 3) * math.sqrt(freedom * math.log1p(difference**2 / variance / freedom))
    return math.copysign(size, difference)
