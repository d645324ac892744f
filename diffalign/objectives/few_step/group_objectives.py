"""Group objectives: how the surrogate learns from the advantages of a group.

Legend: K samples of any number of groups, `group` [K]; A advantages; d and d_ref the denoising errors of surrogate and reference, so
that -beta (d - d_ref) is a sample's implicit reward; G the size of a group.
"""

from abc import ABC, abstractmethod

import attrs
from torch import Tensor, nn

from diffalign.core import group_mean


class GroupObjective(ABC):
    """A loss that is small where samples of large advantage have small errors."""

    @abstractmethod
    def __call__(self, error: Tensor, reference: Tensor, advantage: Tensor, group: Tensor) -> Tensor:
        """Errors d (with a graph), d_ref and A, each [K] -> the group's loss at each of its samples [K]; its mean over the group counts."""


def group_score(error: Tensor, reference: Tensor, advantage: Tensor, group: Tensor, beta: float) -> Tensor:
    """S_g = beta mean over the group of A (d - d_ref), at each sample: [K]. A common shift of d - d_ref cancels where sum A = 0."""
    return beta * group_mean(advantage * (error - reference), group)


@attrs.frozen
class SigmoidWeighted(GroupObjective):
    """sigmoid(S_g) A_i d_i, the sigmoid without gradient: DGPO as released (arXiv:2510.08425).

    beta only sharpens the weight, which is 1/2 where surrogate and reference agree.

    Args:
        beta: inverse temperature of the implicit rewards, > 0
    """

    beta: float = attrs.field(default=10.0, validator=attrs.validators.gt(0))

    def __call__(self, error: Tensor, reference: Tensor, advantage: Tensor, group: Tensor) -> Tensor:
        weight = group_score(error.detach(), reference, advantage, group, self.beta).sigmoid()
        return weight * advantage * error


@attrs.frozen
class ExactSoftplus(GroupObjective):
    """softplus(S_g), the negative log-likelihood of the group's preference; its gradient is beta times that of `SigmoidWeighted`.

    In a group without advantages it is a constant, which has no gradient.

    Args:
        beta: see `SigmoidWeighted`
    """

    beta: float = attrs.field(default=1.0, validator=attrs.validators.gt(0))

    def __call__(self, error: Tensor, reference: Tensor, advantage: Tensor, group: Tensor) -> Tensor:
        return nn.functional.softplus(group_score(error, reference, advantage, group, self.beta))


@attrs.frozen
class AdvantageWeighted(GroupObjective):
    """A_i d_i / 2: regression weighted by the advantage, the limit of small beta, without any reference."""

    def __call__(self, error: Tensor, reference: Tensor, advantage: Tensor, group: Tensor) -> Tensor:
        return advantage * error / 2


@attrs.frozen
class RewardWeighted(GroupObjective):
    """max(1 + strength A_i, 0) d_i: regression on samples that count more the better they are, bounded below for every surrogate.

    Beside a reference that regresses on the same samples with equal weights (`StudentScore`) the optimum is the student's law tilted by
    1 + strength A:  v_phi - v_ref = strength Cov(A, v* | x_tau) / (1 + strength E[A | x_tau]).

    Args:
        strength: > 0; below 1 / max |A| no sample is left out
    """

    strength: float = attrs.field(default=0.5, validator=attrs.validators.gt(0))

    def __call__(self, error: Tensor, reference: Tensor, advantage: Tensor, group: Tensor) -> Tensor:
        return (1 + self.strength * advantage).clamp(min=0) * error
