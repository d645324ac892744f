"""Trust regions: which samples stop pulling at the surrogate.

Legend: K samples; A advantages; d, d_old, d_ref the denoising errors of the surrogate, of its moving average and of the reference.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import attrs
import torch
from torch import Tensor


class TrustRegion(ABC):
    """Names the samples whose error is taken without gradient."""

    reads_old: ClassVar[bool] = True
    """True if `outside` looks at d_old, which costs a row of the moving average for each row of the surrogate."""

    @abstractmethod
    def outside(self, error: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
        """d, d_old and A, each [K] and without gradient -> [K], true where the sample has moved far enough in its direction."""


@attrs.frozen
class RatioClip(TrustRegion):
    """rho = exp(d_old - d) outside 1 +- epsilon on the side that the advantage pulls to.

    Args:
        epsilon: half width
    """

    epsilon: float = attrs.field(default=1e-3, validator=attrs.validators.gt(0))

    def outside(self, error: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
        ratio = (old - error).exp()
        return torch.where(advantage > 0, ratio > 1 + self.epsilon, ratio < 1 - self.epsilon)


@attrs.frozen
class NoTrustRegion(TrustRegion):
    """Nothing is outside, and the moving average is not asked."""

    reads_old: ClassVar[bool] = False

    def outside(self, error: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
        return torch.zeros_like(error, dtype=torch.bool)


def ran_away(error: Tensor, reference: Tensor, advantage: Tensor, distance: Tensor, threshold: float) -> Tensor:
    """Samples that already beat the reference, in a group whose surrogate is farther than `threshold` from the teacher: [K].

    Args:
        error, reference, advantage: [K]
        distance: [K] the group's mean of mean (v_phi - v_psi)^2, at each sample
        threshold: largest distance at which all samples count
    """
    ahead = torch.where(advantage > 0, error < reference, error > reference)
    return (distance > threshold) & ahead
