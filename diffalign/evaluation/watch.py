"""Statistic behind the alarm: has a noisy series moved since it began?"""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import attrs


@attrs.frozen
class Move:
    """Change of a series at a cut: the mean of the steps after it against the mean of all steps before.

    Args:
        before, now: the two means
        errors: (now - before) in standard errors, as a normal deviate
        cut: number of steps before the cut
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
    """Series of one number per step, with estimates of its noise.

        move(k) = (mean of y_k+1 .. y_n - mean of y_1 .. y_k) / (s sqrt(1 / k + 1 / (n - k)))

    with s^2 the variance of a step. Neighbouring steps estimate it by `mean of (y_i+1 - y_i)^2 / 2`, which a slow trend hardly changes. If
    the variance between the prompt groups of a step is known, it is more precise after few steps. Then s^2 is the larger of this variance
    and the neighbours' estimate from the steps before the cut: steps may differ by more than their groups, but the fall itself must not
    count as noise. A move t with nu degrees of freedom is given as the normal deviate of about the same probability (Wallace):

        (8 nu + 1) / (8 nu + 3) sqrt(nu ln(1 + t^2 / nu)),    nu = 2 (n - 1)^2 / (3 n - 4) of neighbours, sum of (groups - 1) of groups

    Args:
        values: y, [n]
        variances: variance of a value, from the groups of its step, with its degrees of freedom; for some steps or none

    Reference: D. L. Wallace, Bounds on normal approximations to Student's and the chi-square distributions, 1959.
    """

    values: Sequence[float]
    variances: Sequence[tuple[float, int]] = ()

    @classmethod
    def held_out(cls, lines: Sequence[Mapping[str, Any]], name: str) -> "Series":
        """Series of a held-out reward, from lines of `watch.jsonl`."""
        variances = [(line["errors"][name] ** 2, _groups(line, name) - 1) for line in lines if _groups(line, name) > 1]
        return cls([line["held_out"][name] for line in lines], variances)

    def moved(self, cut: int) -> Move:
        """Move at a cut, 1 <= cut < n."""
        return self._moves([cut])[0]

    def fallen(self, window: int) -> Move | None:
        """Move at the cut with the clearest fall, with at least `window` steps on both sides; None with fewer than two windows."""
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


def _groups(line: Mapping[str, Any], name: str) -> int:
    """Prompt groups that a held-out reward applied to; of a line of an older run, those of the step."""
    known = line.get("groups", 1)
    return int(known.get(name, 1) if isinstance(known, Mapping) else known)


def _deviate(difference: float, variance: float, freedom: float) -> float:
    if abs(difference) < 1e-12:  # rounding of sums of equal numbers
        return 0.0
    if variance == 0:
        return math.copysign(math.inf, difference)
    size = (8 * freedom + 1) / (8 * freedom + 3) * math.sqrt(freedom * math.log1p(difference**2 / variance / freedom))
    return math.copysign(size, difference)
