"""Attribution: from the reward of a finished sample to the advantage of every state on its way.

Legend: K samples, T stages.
"""

from abc import ABC, abstractmethod

import attrs
import torch
from torch import Tensor

from diffalign.core import TrajectoryBatch


class Attribution(ABC):
    """Gives the advantage of a finished sample to the ends of its stages."""

    @abstractmethod
    def __call__(self, trajectories: TrajectoryBatch, advantage: Tensor) -> Tensor:
        """[K] -> [K, T], the advantage of the state at the end of each stage."""


@attrs.frozen
class Broadcast(Attribution):
    """The same at every stage. On a deterministic trajectory that is no estimate: every state leads to its one sample, so the sample's
    reward is the state's value.

    Raises:
        ValueError: the trajectories are stochastic.
    """

    def __call__(self, trajectories: TrajectoryBatch, advantage: Tensor) -> Tensor:
        if len(trajectories.stochastic):
            raise ValueError(
                f"Broadcast needs deterministic trajectories, on which a state has one outcome; {len(trajectories.stochastic)} edges of "
                "this batch are stochastic. Use DeterministicSampler, or attribution MonteCarlo."
            )
        return advantage[:, None].expand(-1, len(trajectories.sigmas) - 1)


@attrs.frozen
class MonteCarlo(Attribution):
    """The mean over the samples that grew from the state: unbiased for stochastic trajectories, and noisy unless they branch."""

    def __call__(self, trajectories: TrajectoryBatch, advantage: Tensor) -> Tensor:
        return trajectories.node_mean(advantage)[trajectories.paths[:, 1:]]


@attrs.frozen
class Discounted(Attribution):
    """gamma^(T - 1 - j) A at the end of stage j: early stages count less.

    Args:
        gamma: in (0, 1]
    """

    gamma: float = attrs.field(default=0.9, validator=[attrs.validators.gt(0), attrs.validators.le(1)])

    def __call__(self, trajectories: TrajectoryBatch, advantage: Tensor) -> Tensor:
        stages = len(trajectories.sigmas) - 1
        factors = self.gamma ** torch.arange(stages - 1, -1, -1, dtype=advantage.dtype, device=advantage.device)
        return Broadcast()(trajectories, advantage) * factors
