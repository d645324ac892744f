"""Query times: the noise levels at which velocities are asked for."""

import math
from abc import ABC, abstractmethod

import attrs
import torch
from torch import Tensor


class QueryTime(ABC):
    """Draws tau in (low, high] from uniform numbers."""

    @abstractmethod
    def __call__(self, low: Tensor, high: Tensor, uniform: Tensor) -> Tensor:
        """Taus [B] above `low` [B] by a margin and at most `high` [B], for `uniform` [B] in [0, 1).

        Raises:
            ValueError: there is no such tau for a row; the message names the sigmas of the first.
        """

    def latest(self, high: Tensor) -> Tensor:
        """The largest `low` [B] that leaves room below `high` [B], where random ends of stages are held.

        Without another word it is `high`, which is right for a rule without a margin.
        """
        return high


def shift_time(u: Tensor, shift: float) -> Tensor:
    """The shift map sh(u) = a u / (1 + (a - 1) u) of `ShiftedGrid`."""
    return shift * u / (1 + (shift - 1) * u)


def unshift_time(sigma: Tensor, shift: float) -> Tensor:
    """Its inverse, sigma / (a - (a - 1) sigma)."""
    return sigma / (shift - (shift - 1) * sigma)


_ROOM = 1e-4
"""Room that is left above `QueryTime.latest`: more than float32 rounds."""


def _between(low: Tensor, high: Tensor, uniform: Tensor, margin: float) -> Tensor:
    return low + margin + uniform * (high - low - margin)


def _require_room(none: Tensor, low: Tensor, least: Tensor, high: Tensor, margin: str) -> None:
    """Refuse rows without room.

    Args:
        none: [B] bool, true where there is none
        low, least, high: [B] sigmas: of the stage's end or the floor, above the margin, and at the top
        margin: the margin in words

    Raises:
        ValueError: there is such a row; the message names the first.
    """
    if bool(none.any()):
        row = int(none.nonzero()[0])
        raise ValueError(
            f"query times must lie between sigma {least[row].item():.4g} ({low[row].item():.4g} and a margin of {margin}) and sigma "
            f"{high[row].item():.4g}, where there is nothing. Lower the floor or the margin, or take the interval Overlap or a higher "
            "ceiling."
        )


@attrs.frozen
class ShiftedTime(QueryTime):
    """Uniform before the shift map: u = sh^-1(low) + margin + r (sh^-1(high) - sh^-1(low) - margin), tau = sh(u).

    Args:
        shift: a of the map; 1 is uniform in sigma
        margin: least distance from the stage's end, before the shift: targets explode there

    Reference: the TDM-R1 release, arXiv:2603.07700, with shift 3 and margin 0.02.
    """

    shift: float = attrs.field(default=3.0, validator=attrs.validators.gt(0))
    margin: float = attrs.field(default=0.02, validator=[attrs.validators.gt(0), attrs.validators.lt(1)])

    def __call__(self, low: Tensor, high: Tensor, uniform: Tensor) -> Tensor:
        before, end = unshift_time(low, self.shift), unshift_time(high, self.shift)
        least = shift_time(before + self.margin, self.shift)
        _require_room(before + self.margin >= end, low, least, high, f"{self.margin:g} before the shift")
        return shift_time(_between(before, end, uniform, self.margin), self.shift)

    def latest(self, high: Tensor) -> Tensor:
        return shift_time((unshift_time(high, self.shift) - self.margin - _ROOM).clamp(min=0), self.shift)


@attrs.frozen
class LogitNormalTime(QueryTime):
    """tau = low + margin + sigmoid(mean + std z) (high - low - margin), z standard normal: most queries in the middle.

    Args:
        mean, std: mean and standard deviation of the logit
        margin: least distance from the stage's end
    """

    mean: float = 0.0
    std: float = attrs.field(default=1.0, validator=attrs.validators.gt(0))
    margin: float = attrs.field(default=0.02, validator=[attrs.validators.gt(0), attrs.validators.lt(1)])

    def __call__(self, low: Tensor, high: Tensor, uniform: Tensor) -> Tensor:
        _require_room(low + self.margin >= high, low, low + self.margin, high, f"{self.margin:g}")
        normal = torch.erfinv((2 * uniform - 1).clamp(-0.999999, 0.999999)) * math.sqrt(2)
        return _between(low, high, torch.sigmoid(self.mean + self.std * normal), self.margin)

    def latest(self, high: Tensor) -> Tensor:
        return high - self.margin - _ROOM


@attrs.frozen
class FixedTime(QueryTime):
    """Always the same tau, for studies and closed forms.

    Args:
        tau: in (0, 1]
    """

    tau: float = attrs.field(validator=[attrs.validators.gt(0), attrs.validators.le(1)])

    def __call__(self, low: Tensor, high: Tensor, uniform: Tensor) -> Tensor:
        outside = (low >= self.tau) | (high < self.tau)
        if bool(outside.any()):
            row = int(outside.nonzero()[0])
            raise ValueError(
                f"FixedTime.tau must lie in the stage's interval ({low[row].item():.4g}, {high[row].item():.4g}]; got {self.tau:g}"
            )
        return torch.full_like(low, self.tau)

    def latest(self, high: Tensor) -> Tensor:
        return torch.full_like(high, self.tau - _ROOM)
