"""Fake targets: what the fake score regresses on to learn the student's diffused marginals.

Legend: B rows, * latent dimensions; x = x_{j+1} the end of a stage at sigma s, xhat0 the stage's clean prediction, e unit noise,
x_tau = a x + b e.
"""

from abc import ABC, abstractmethod

import attrs
from torch import Tensor

from diffalign.core.transition import expand

from ..noising import bridge_velocity, kernel, mean_over_dimensions


@attrs.frozen(eq=False)
class NoisedEnds:
    """Ends of stages, noised.

    Args:
        end: [B, *] x
        clean: [B, *] xhat0
        s: [B]
        tau: [B]
        noise: [B, *] e
        noised: [B, *] x_tau
    """

    end: Tensor
    clean: Tensor
    s: Tensor
    tau: Tensor
    noise: Tensor
    noised: Tensor


class FakeTarget(ABC):
    """The loss of a row is weight * mean ||v_fake(x_tau, tau) - target||^2."""

    @abstractmethod
    def __call__(self, ends: NoisedEnds) -> tuple[Tensor, Tensor]:
        """Target velocities [B, *] and weights [B]."""


@attrs.frozen
class CleanTarget(FakeTarget):
    """(x_tau - xhat0) / tau: the clean prediction as if x_tau were made from it (the TDM-R1 release).

    Its minimiser is the student's diffused marginal at the last stage only; before, it lies between that and the diffused xhat0.
    """

    def __call__(self, ends: NoisedEnds) -> tuple[Tensor, Tensor]:
        return _clean_velocity(ends), ends.tau.new_ones(ends.tau.shape)


@attrs.frozen
class WeightedCleanTarget(FakeTarget):
    """The same target with the importance weight of xhat0's own noising, in clean-prediction units with a cap on the signal-to-noise.

        m = (a (x - (1 - s) xhat0) + b e) / tau                            the whole noise of x_tau relative to xhat0
        weight = min(((1 - tau) / tau)^2, cap) tau^2 r
        r = (b / tau)^D exp(-|m|^2 / 2) / exp(-|e|^2 / 2)                  N(x_tau; (1 - tau) xhat0, tau^2) / N(x_tau; a x, b^2)

    Args:
        cap: largest signal-to-noise ratio
        tempered: r is exp(-<m^2> / 2) / exp(-<e^2> / 2) with means over the D dimensions, as in the TDM demo; false takes the true
            likelihood ratio, whose mean is 1 and whose minimiser is the law of diffused xhat0

    Reference: Luo et al., TDM, arXiv:2503.06674.
    """

    cap: float = attrs.field(default=5.0, validator=attrs.validators.gt(0))
    tempered: bool = True

    def __call__(self, ends: NoisedEnds) -> tuple[Tensor, Tensor]:
        a, b = kernel(ends.s, ends.tau)
        carried = ends.end - expand(1 - ends.s, ends.end) * ends.clean
        mixed = (expand(a, carried) * carried + expand(b, carried) * ends.noise) / expand(ends.tau, carried)
        log_ratio = (mean_over_dimensions(ends.noise.square()) - mean_over_dimensions(mixed.square())) / 2
        if not self.tempered:
            log_ratio = ends.noise[0].numel() * (log_ratio + (b / ends.tau).log())
        signal = ((1 - ends.tau) / ends.tau).square().clamp(max=self.cap)
        return _clean_velocity(ends), signal * ends.tau.square() * log_ratio.exp()


@attrs.frozen
class ExactTarget(FakeTarget):
    """The velocity of the added noise itself (`bridge_velocity`), whose mean is the exact score of the diffused ends at every stage."""

    def __call__(self, ends: NoisedEnds) -> tuple[Tensor, Tensor]:
        return bridge_velocity(ends.end, ends.s, ends.tau, ends.noise), ends.tau.new_ones(ends.tau.shape)


def _clean_velocity(ends: NoisedEnds) -> Tensor:
    return (ends.noised - ends.clean) / expand(ends.tau, ends.noised)
