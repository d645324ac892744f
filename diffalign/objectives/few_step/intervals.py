"""Intervals: at which noise levels a stage of the student is compared."""

from abc import ABC, abstractmethod

import attrs
from torch import Tensor


class Interval(ABC):
    """The sigmas at which the law of a stage's end is compared with the teacher's."""

    @abstractmethod
    def top(self, sigma: Tensor) -> Tensor:
        """The upper bound for stages that start at `sigma` [B]: [B]. The lower bound is always the end of the stage."""


@attrs.frozen
class Overlap(Interval):
    """[s_{j+1}, 1): every stage up to full noise, or to the noise that trajectories start from.

    One fake score serves all stages, of which it then knows the mixture.
    """

    def top(self, sigma: Tensor) -> Tensor:
        return sigma.new_ones(sigma.shape)


@attrs.frozen
class Separate(Interval):
    """[s_{j+1}, s_j): disjoint, so that the fake score of every stage is its own (TDM, arXiv:2503.06674)."""

    def top(self, sigma: Tensor) -> Tensor:
        return sigma.clone()
