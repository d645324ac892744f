"""Advantages: from the rewards of a group to how much better each of its samples is than the others.

Legend: K samples of any number of groups, `group` [K].
"""

from abc import ABC, abstractmethod
from typing import Literal

import attrs
import torch
from torch import Tensor

from diffalign.core import group_mean, group_std
from diffalign.core.words import allowed_word

from ..requirements import group_has_spread


class Advantage(ABC):
    """A rule from rewards to advantages that sum to 0 in every group, and are 0 in one whose rewards are all equal."""

    @abstractmethod
    def __call__(self, rewards: Tensor, group: Tensor, deviation: float | None = None) -> Tensor:
        """[K], [K] -> [K], float64.

        Args:
            rewards: aggregated
            group: prompt group of each sample
            deviation: standard deviation of the rewards over all processes; None takes that of `rewards`
        """


@attrs.frozen
class GroupAdvantage(Advantage):
    """A = clip((r - mean of the group) / (std + epsilon), +-bound); exactly 0 in a group whose rewards are all equal.

    Args:
        scale: divisor, the standard deviation of all rewards of the step, over all processes ("batch"), or of the group; or none
        epsilon: added to it
        bound: largest |A|; where it bites, the advantages of a group no longer sum to 0. None does not clip
    """

    scale: Literal["batch", "group", "none"] = attrs.field(default="batch", validator=allowed_word)
    epsilon: float = attrs.field(default=1e-4, validator=attrs.validators.gt(0))
    bound: float | None = attrs.field(default=5.0, validator=attrs.validators.optional(attrs.validators.gt(0.0)))  # type: ignore[arg-type]

    def __call__(self, rewards: Tensor, group: Tensor, deviation: float | None = None) -> Tensor:
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


@attrs.frozen
class SignAdvantage(Advantage):
    """s_i - mean of s over the group, with s_i = 1 for rewards of at least the group's mean and -1 below ("grpo_bi" of the TDM-R1 release).

    How much better a sample is does not count, so a single outlier cannot hold the whole of a group's weight.
    """

    def __call__(self, rewards: Tensor, group: Tensor, deviation: float | None = None) -> Tensor:
        values = rewards.double()
        signs = torch.where(values >= group_mean(values, group), 1.0, -1.0).double()
        return torch.where(group_has_spread(rewards, group), signs - group_mean(signs, group), 0.0)


@attrs.frozen
class ExtremesAdvantage(Advantage):
    """1 for the best samples of a group and -1 for the worst, shared equally where several are; all others 0 ("dpo" of the TDM-R1 release).

    The release takes the first of several best and of several worst ones; which is first means nothing here.
    """

    def __call__(self, rewards: Tensor, group: Tensor, deviation: float | None = None) -> Tensor:
        values = rewards.double()
        return torch.where(group_has_spread(rewards, group), _share_of_largest(values, group) - _share_of_largest(-values, group), 0.0)


def _share_of_largest(values: Tensor, group: Tensor) -> Tensor:
    """1 / n at the n largest values of each group, 0 elsewhere: [K]."""
    start = values.new_zeros(int(group.max()) + 1)
    largest = start.scatter_reduce(0, group, values, "amax", include_self=False)[group]
    chosen = (values == largest).double()
    return chosen / start.scatter_add(0, group, chosen)[group]
