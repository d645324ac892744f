"""Directions: how the generator is moved along differences of clean predictions.

A term moves the stage's clean prediction xhat0 along a direction D by the loss distance(D) / w, whose gradient is that of
distance(xhat0 - stopgrad(xhat0 + D)). Legend: B rows, * latent dimensions.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import attrs
import torch
from torch import Tensor

from ..noising import mean_over_dimensions

TERMS = ("kl", "guidance", "reward")
"""f_psi - f_fake; (g - 1) (f_psi(c) - f_psi(null)); f_phi - f_base."""


class Distance(ABC):
    """A regression loss of a residual."""

    @abstractmethod
    def __call__(self, residual: Tensor) -> Tensor:
        """[B, *] -> [B]."""


@attrs.frozen
class Squared(Distance):
    """mean D^2: the gradient is proportional to the direction."""

    def __call__(self, residual: Tensor) -> Tensor:
        return mean_over_dimensions(residual.square())


@attrs.frozen
class Huber(Distance):
    """mean sqrt(D^2 + c^2) - c, element by element: beyond c the gradient is a sign, so scaling a direction changes little.

    Args:
        c: value at which it turns from square to linear; 1e-3 in the TDM demo
    """

    c: float = attrs.field(default=1e-3, validator=attrs.validators.gt(0))

    def __call__(self, residual: Tensor) -> Tensor:
        return mean_over_dimensions((residual.square() + self.c**2).sqrt() - self.c)


@attrs.frozen
class VectorHuber(Distance):
    """sqrt(||D||^2 + c^2) - c of the whole vector, c = factor sqrt(dimensions), per dimension (the TDM paper, arXiv:2503.06674).

    Args:
        factor: see above
    """

    factor: float = attrs.field(default=0.00054, validator=attrs.validators.gt(0))

    def __call__(self, residual: Tensor) -> Tensor:
        size = residual[0].numel()
        c = self.factor * size**0.5
        value: Tensor = ((residual.flatten(1).square().sum(dim=1) + c**2).sqrt() - c) / size
        return value


class Normalizer(ABC):
    """The divisor w of a term."""

    @abstractmethod
    def __call__(self, clean: Tensor, aims: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The stage's prediction [B, *] and where each term wants it, by term [B, *] -> w by term, each [B] > 0."""


@attrs.frozen
class PerTerm(Normalizer):
    """w = mean |xhat0 - aim|, each term by its own aim: small differences count as much as large ones.

    Args:
        floor: least w
    """

    floor: float = attrs.field(default=1e-4, validator=attrs.validators.gt(0))

    def __call__(self, clean: Tensor, aims: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            term: mean_over_dimensions((clean.double() - aim.double()).abs()).clamp(min=self.floor).to(clean.dtype)
            for term, aim in aims.items()
        }


@attrs.frozen
class Joint(Normalizer):
    """The largest of the terms' w for all of them.

    Args:
        floor: least w
    """

    floor: float = attrs.field(default=1e-4, validator=attrs.validators.gt(0))

    def __call__(self, clean: Tensor, aims: Mapping[str, Tensor]) -> dict[str, Tensor]:
        apart = PerTerm(self.floor)(clean, aims)
        return dict.fromkeys(apart, torch.stack(list(apart.values())).amax(dim=0))


@attrs.frozen
class Unnormalized(Normalizer):
    """w = 1: the fixed point is the teacher's density times (p_phi / p_ref)^k."""

    def __call__(self, clean: Tensor, aims: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {term: clean.new_ones(len(clean)) for term in aims}


class GeneratorMix(ABC):
    """The weights of the terms."""

    @abstractmethod
    def weights(self, rewarded: bool) -> Mapping[str, float]:
        """Weight of each term, for stages that the reward reaches and for those that it does not."""


@attrs.frozen
class ShareMix(GeneratorMix):
    """kl + share guidance + (1 - share) reward; where the reward does not reach, share (kl + guidance): the TDM-R1 release.

    Args:
        share: in [0, 1]; 1 leaves the learned reward out, 0 the guidance
    """

    share: float = attrs.field(default=0.3, validator=[attrs.validators.ge(0), attrs.validators.le(1)])

    def weights(self, rewarded: bool) -> Mapping[str, float]:
        if rewarded:
            return {"kl": 1.0, "guidance": self.share, "reward": 1 - self.share}
        return {"kl": self.share, "guidance": self.share, "reward": 0.0}


@attrs.frozen
class WeightedMix(GeneratorMix):
    """kl_weight kl + guidance guidance + reward reward; with the others off, the student's optimum is p_psi (p_phi / p_ref)^(reward / kl).

    Args:
        reward, guidance, kl: weights, >= 0
    """

    reward: float = attrs.field(default=1.0, validator=attrs.validators.ge(0))
    guidance: float = attrs.field(default=1.0, validator=attrs.validators.ge(0))
    kl: float = attrs.field(default=1.0, validator=attrs.validators.ge(0))

    def weights(self, rewarded: bool) -> Mapping[str, float]:
        return {"kl": self.kl, "guidance": self.guidance, "reward": self.reward if rewarded else 0.0}


def pull(clean: Tensor, direction: Tensor, distance: Distance) -> Tensor:
    """Distance(D) of each row [B], with the gradient of distance(xhat0 - stopgrad(xhat0 + D)); exactly 0 for D = 0.

    Not computed as that difference, which would lose what D has below the last digit of xhat0.
    """
    return distance(direction - (clean - clean.detach()))
