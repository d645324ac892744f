"""Attribution: from the reward of a finished sample to the advantage of every state on its way.

Legend: K samples, T stages.
"""

from abc import ABC, abstractmethod
from typing import Literal

import attrs
import torch
from torch import Tensor

from diffalign.core import TrajectoryBatch, group_mean, group_std

from ..requirements import group_has_spread


@attrs.frozen
class GroupAdvantage:
    """A = clip((r - mean of the group) / (std + epsilon), +-bound); exactly 0 in a group whose rewards are all equal.

    Args:
        scale: whose standard deviation: of all rewards of the step, over all processes ("batch"), or of the group; or none
        epsilon: added to it
        bound: largest |A|; where it bites, the advantages of a group no longer sum to 0. None does not clip
    """

    scale: Literal["batch", "group", "none"] = "batch"
    epsilon: float = attrs.field(default=1e-4, validator=attrs.validators.gt(0))
    bound: float | None = attrs.field(default=5.0, validator=attrs.validators.optional(attrs.validators.gt(0.0)))  # type: ignore[arg-type]

    def __call__(self, rewards: Tensor, group: Tensor, deviation: float | None = None) -> Tensor:
        """[K], [K] -> [K], float64.

        Args:
            rewards: aggregated
            group: of each sample
            deviation: standard deviation of the rewards over all processes; None takes that of `rewards`
        """
        values = rewards.double()
        advantage = values - group_mean(values, group)
        if self.scale == "batch":
            spread = float(values.std(unbiased=False)) if deviation is None else deviation
            advantage = advantage / (spread + self.epsilon)
        elif self.scale == "group":
            advantage = advantage / (group_std(values, group) + self.epsilon)
        if self.bound is not None:
            advantage = advantage.clamp(-self.bound, self.bound)
        # the mean of equal numbers may be an ulp off, so a group without spread is told by its rewards
        return torch.where(group_has_spread(rewards, group), advantage, 0.0)


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
