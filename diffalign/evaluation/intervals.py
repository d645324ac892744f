"""Uncertainty of means over prompts: bootstrap intervals, paired changes, win rates.

The bootstrap draws prompts, not samples: samples of one prompt are alike, so they are averaged first.
"""

import math
from collections.abc import Sequence

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

RESAMPLES = 2000
"""Number of draws of a bootstrap; its own error is then about 2 % of the interval's width."""

_BLOCK = 1 << 22


@attrs.frozen
class Interval:
    """Mean with its 95 % interval.

    Args:
        mean: mean over the units
        low, high: ends of the interval; None for a single unit, from which no interval can be estimated
    """

    mean: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        return f"{self.mean:.3f}{self._ends('.3f')}"

    def signed(self) -> str:
        """Format the interval as text with signs, for a change."""
        return f"{self.mean:+.3f}{self._ends('+.3f')}"

    def _ends(self, form: str) -> str:
        return "" if self.low is None or self.high is None else f" [{self.low:{form}}, {self.high:{form}}]"

    def plain(self) -> dict[str, float | None]:
        """Convert the interval to plain JSON values."""
        return {"mean": self.mean, "low": self.low, "high": self.high}


def bootstrap(values: Tensor, seed: int = 0) -> Interval:
    """Mean over units and its 95 % percentile bootstrap interval.

        m* = mean + sqrt(P / (P - 1)) (mean of P units drawn with replacement - mean),   interval = its 2.5 and 97.5 % quantiles

    A bootstrap of few units is too narrow by the factor sqrt((P - 1) / P); the formula corrects this. For normal values the width is that
    of the normal interval.

    Args:
        values: [P], or [P, n], which is averaged over n first; finite
        seed: seed of the draws; equal seeds draw equal units

    Raises:
        ValueError: there are no values, or one is not finite.
    """
    units = _units(values)
    count, mean = len(units), float(units.mean())
    if count == 1:
        return Interval(mean)
    low, high = np.quantile(_deviations(units, _draws(seed)), [0.025, 0.975]) * _widening(count)
    return Interval(mean, mean + float(low), mean + float(high))


def mean_of_means(groups: Sequence[Tensor], seed: int = 0) -> Interval:
    """The mean over groups of their means, and its 95 % percentile bootstrap interval; prompts are drawn again within each group.

        m* = sum_g (mean_g + sqrt(P_g / (P_g - 1)) (mean of P_g units drawn with replacement - mean_g)) / G

    Args:
        groups: G, each [P_g], or [P_g, n], which is averaged over n first; finite
        seed: seed of the draws

    Raises:
        ValueError: there is no group, or one is empty or not finite.
    """
    if not groups:
        raise ValueError("a mean of means needs at least one group; got none")
    units = [_units(values) for values in groups]
    mean = float(np.mean([each.mean() for each in units]))
    if min(map(len, units)) == 1:
        return Interval(mean)
    draws = _draws(seed)
    deviations = np.mean([_deviations(each, draws) * _widening(len(each)) for each in units], axis=0)
    low, high = np.quantile(deviations, [0.025, 0.975])
    return Interval(mean, mean + float(low), mean + float(high))


def _draws(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def _deviations(units: NDArray[np.float64], draws: np.random.Generator) -> NDArray[np.float64]:
    """[P] -> [RESAMPLES] means of P units drawn with replacement, minus the mean."""
    count = len(units)
    share = max(1, _BLOCK // count)
    means: NDArray[np.float64] = np.concatenate(
        [units[draws.integers(count, size=(min(share, RESAMPLES - done), count))].mean(axis=1) for done in range(0, RESAMPLES, share)]
    )
    return means - float(units.mean())


def _widening(count: int) -> float:
    return math.sqrt(count / (count - 1))


def paired_change(before: Tensor, after: Tensor, seed: int = 0) -> Interval:
    """Mean of after - before, prompt by prompt, with its interval: [P] and [P], or [P, n] each.

    Raises:
        ValueError: the shapes differ.
    """
    _require_pairs(before, after)
    return bootstrap(after - before, seed)


def win_rate(mine: Tensor, other: Tensor, seed: int = 0, counts: Tensor | None = None) -> Interval:
    """Share of cases in which `mine` is larger for the same prompt and noise; a tie counts one half: [P] or [P, n] each -> in [0, 1].

    Args:
        mine: numbers of the one
        other: numbers of the other
        seed: seed of the draws of prompts
        counts: [P, n] bool, the cases that count; a prompt without any is left out. None counts all

    Raises:
        ValueError: the shapes differ, or no case counts.
    """
    _require_pairs(mine, other)
    wins = (mine > other).double() + 0.5 * (mine == other).double()
    if counts is not None and not bool(counts.all()):
        some = counts.any(dim=1)
        wins = (wins * counts).sum(dim=1)[some] / counts.sum(dim=1)[some]
    rate = bootstrap(wins, seed)
    if rate.low is None or rate.high is None:
        return rate
    return Interval(rate.mean, max(0.0, rate.low), min(1.0, rate.high))  # the correction in `bootstrap` may leave [0, 1]


def _units(values: Tensor) -> NDArray[np.float64]:
    units = torch.as_tensor(values).detach().double().cpu()
    units = units.flatten(1).mean(dim=1) if units.ndim > 1 else units
    if units.ndim != 1 or len(units) == 0 or not bool(units.isfinite().all()):
        raise ValueError(f"an interval needs finite values of at least one prompt; got shape {tuple(values.shape)}")
    array: NDArray[np.float64] = units.numpy()
    return array


def _require_pairs(first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape:
        raise ValueError(f"paired values must have one shape, with the same prompts in order; got {first.shape} and {second.shape}")
