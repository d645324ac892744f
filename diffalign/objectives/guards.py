"""Guards that keep an update near the weights that it starts from: small values, which objectives take.

Legend: B rows, * latent dimensions. `RatioNorm`, the guard of path ratios, is in `ratio.py`.
"""

import attrs
import torch
from torch import Tensor


@attrs.frozen
class KLMask:
    """Blocks the gradient of what is already far from the old policy and would move further away.

        blocked where  KL > threshold  and  (A > 0 and rho > 1  or  A < 0 and rho < 1)

    A ratio rho = p_theta / p_old of one sample is noisy; the divergence of two Gaussian steps, or of two velocities, is exact. A sample
    that comes back towards the old policy is never blocked. It takes the place of the clip of a ratio.

    Args:
        threshold: least divergence that is blocked, > 0, in nats per latent dimension. The authors' code takes 1e-5

    Raises:
        ValueError: the threshold is not positive.

    Reference: Flow-DPPO, arXiv:2606.11025.
    """

    threshold: float = attrs.field(default=1e-5, validator=attrs.validators.gt(0.0))

    @torch.no_grad()
    def blocked(self, advantage: Tensor, log_ratio: Tensor, divergence: Tensor) -> Tensor:
        """Say which rows get no gradient: [B], bool.

        Args:
            advantage: [B] A
            log_ratio: [B] log rho
            divergence: [B] KL(p_old || p_theta), nats per dimension
        """
        away = ((advantage > 0) & (log_ratio > 0)) | ((advantage < 0) & (log_ratio < 0))
        return away & (divergence > self.threshold)

    def surrogate(self, advantage: Tensor, log_ratio: Tensor, divergence: Tensor) -> Tensor:
        """Policy-gradient surrogate -A rho, without gradient where it is blocked: [B]."""
        value = -advantage * log_ratio.exp()
        return torch.where(self.blocked(advantage, log_ratio, divergence), value.detach(), value)


@attrs.frozen
class NormGuard:
    """Penalty of velocities that are longer than those of the reference.

        penalty = weight max(0, ||v_theta|| / ||v_ref|| - 1 - margin)

    Reinforcement makes velocities 5 to 15 % longer, and images worse, where the reward does not see it. Shorter velocities cost nothing.
    That the penalty is a hinge is the paper's; its power and its unit could not be confirmed. Ours is linear and relative, so that the
    weight does not depend on the size of latents.

    Args:
        weight: weight of the penalty, > 0
        margin: excess of the relative norm that is free, >= 0

    Raises:
        ValueError: a number is out of range.

    Reference: NormGuard, arXiv:2606.27771.
    """

    weight: float = attrs.field(default=1.0, validator=attrs.validators.gt(0.0))
    margin: float = attrs.field(default=0.0, validator=attrs.validators.ge(0.0))

    def excess(self, velocity: Tensor, reference: Tensor) -> Tensor:
        """Excess of the relative norm over 1, ||v_theta|| / ||v_ref|| - 1, of each row [B, *]: [B], float64."""
        own, other = (values.flatten(1).double().norm(dim=1) for values in (velocity, reference))
        relative: Tensor = own / other.clamp(min=1e-12)
        return relative - 1

    def penalty(self, velocity: Tensor, reference: Tensor) -> Tensor:
        """Penalty of each row: [B], float64, with the gradient of the velocity [B, *]; none where no velocity is too long.

        `clamp(min=0)` would not do: its gradient at 0 is 1, and at the start of a run every excess is exactly 0.
        """
        return self.weight * (self.excess(velocity, reference) - self.margin).relu()
