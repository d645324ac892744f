"""Choice of the pictures that people are asked about."""

from abc import ABC, abstractmethod

import attrs
import torch
from torch import Tensor

from ..core import Progress
from .model import Belief


class Choice(ABC):
    """Chooses pictures of a step."""

    @abstractmethod
    def order(self, belief: Belief, count: int, progress: Progress) -> list[int]:
        """Places of `count` different pictures of K >= count, the first to be asked about first.

        Args:
            belief: opinion of the model of votes about the K pictures; without votes its mean is 0
            count: number of pictures
            progress: progress of the run
        """


@attrs.frozen
class AtRandom(Choice):
    """Any pictures, each with the same chance, by the number of the step and a seed.

    Args:
        seed: seed of the draw
    """

    seed: int = 0

    def order(self, belief: Belief, count: int, progress: Progress) -> list[int]:
        return _shuffled(len(belief.mean), self.seed, progress.step)[:count]


@attrs.frozen
class Disagreement(Choice):
    """Pictures about which the model of votes is least sure, one after the other; some at random.

        next = argmax_k  confidence s_k - |m_k|     with mean m and deviation s of the model's belief

    (the straddle rule). After each choice s is updated as if that picture were voted on, for which the answer need not be known. So no two
    pictures are chosen that say the same.

    Args:
        random: share of the pictures that is drawn at random, which keeps the model honest about what it believes to know
        confidence: deviations that count
        seed: seed of the random share

    Reference: Bryan et al., Active learning for identifying function threshold boundaries, NeurIPS 2005.
    """

    random: float = attrs.field(default=0.25, validator=[attrs.validators.ge(0.0), attrs.validators.le(1.0)])
    confidence: float = attrs.field(default=1.96, validator=attrs.validators.gt(0.0))
    seed: int = 0

    def order(self, belief: Belief, count: int, progress: Progress) -> list[int]:
        shuffled = _shuffled(len(belief.mean), self.seed, progress.step)
        chosen: list[int] = []
        covariance = belief.covariance.clone()
        for place in range(count):
            drawn = int((place + 1) * self.random) > int(place * self.random)  # evenly among the others
            free = torch.ones(len(shuffled), dtype=torch.bool).index_fill(0, torch.tensor(chosen, dtype=torch.long), False)
            best = next(each for each in shuffled if free[each]) if drawn else self._best(belief.mean, covariance, free)
            chosen.append(best)
            column = covariance[:, best].clone()
            covariance -= torch.outer(column, column) / (column[best] + _ANSWERED)
        return chosen

    def _best(self, mean: Tensor, covariance: Tensor, free: Tensor) -> int:
        worth = self.confidence * covariance.diagonal().clamp(min=0).sqrt() - mean.abs()
        return int(torch.where(free, worth, -torch.inf).argmax())


_ANSWERED = 0.25
"""Variance of an answer's noise, by which a picture that was chosen still can be uncertain."""


def _shuffled(count: int, seed: int, step: int) -> list[int]:
    generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + step)
    return torch.randperm(count, generator=generator).tolist()
