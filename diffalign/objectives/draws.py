"""Draws of noise levels and noises for losses on noised ends."""

from abc import ABC, abstractmethod

import attrs

from diffalign.core import Outline, ScoredBatch

from .noised import NoisedSamples, require_levels


class Draws(ABC):
    """Rule that adds noise to the samples of a batch."""

    @property
    @abstractmethod
    def units(self) -> int:
        """Noised units of each sample, M."""

    @abstractmethod
    def __call__(self, batch: ScoredBatch, name: str, objective: str) -> NoisedSamples:
        """Choose the noise levels of an update.

        Args:
            batch: batch with the samples
            name: name of the random draws, which differ between updates
            objective: class of the objective in error messages

        Raises:
            ValueError: the rollout's grid has too few levels.
        """

    @abstractmethod
    def require(self, outline: Outline, objective: str) -> None:
        """Refuse a rollout of which a grid has too few levels: see `Objective.require`."""


@attrs.frozen
class GridDraws(Draws):
    """Draws M levels of each sample from the rollout's grid, without replacement, each with a noise of its own.

    Args:
        levels: number M of noise levels of each sample
        sigma_min: least noise level
        shared: whether all samples of a prompt have the same levels and noise
    """

    levels: int
    sigma_min: float
    shared: bool

    @property
    def units(self) -> int:
        return self.levels

    def __call__(self, batch: ScoredBatch, name: str, objective: str) -> NoisedSamples:
        return NoisedSamples.draw(batch, self.levels, self.sigma_min, self.shared, name, objective)

    def require(self, outline: Outline, objective: str) -> None:
        for grid in outline.grids:
            require_levels(grid[:-1], self.levels, self.sigma_min, objective)
