"""Importance ratios of a path: current weights against the weights that rolled out.

Legend: E stochastic edges, K samples, * latent dimensions, D their number; <.> is the mean over D.
"""

from collections.abc import Callable

import attrs
import torch
from torch import Tensor

from diffalign.core import Edges, Gaussian, TrajectoryBatch, group_mean

PathMean = Callable[[Tensor], Tensor]
"""Function that takes the mean over the stochastic edges of each path: [E] -> [K]."""


@attrs.frozen(eq=False)
class Shift:
    """Movement of the mean of each edge since the rollout. `RatioNorm` needs only these numbers, which are smaller than transitions.

    Args:
        squares: [E] <(mu - mu_old)^2>, float64
        std: [E] standard deviation n
        density: log-density convention
        size: latent dimensions D
    """

    squares: Tensor
    std: Tensor
    density: str
    size: int

    @classmethod
    def between(cls, old_mean: Tensor, transition: Gaussian) -> "Shift":
        """Compute the movement from mu_old [E, *] to the transition of each edge under the current weights."""
        squares = (transition.mean - old_mean).flatten(1).double().square().mean(dim=1)
        return cls(squares, transition.std, transition.density, old_mean[0].numel())

    def normalized(self, log_ratio: Tensor) -> Tensor:
        """Normalised log-ratio u of each edge from l - l_old [E], with the gradients of its inputs: [E]. See `RatioNorm`."""
        squares, std = self.squares, self.std.double()
        if self.density == "squared":
            return (log_ratio + squares) / (2 * std)
        per_dimension = log_ratio / self.size if self.density == "sum" else log_ratio
        return (per_dimension + squares / (2 * std.square())) * std


def shift_numbers(trajectories: TrajectoryBatch, edges: Edges, transition: Gaussian) -> dict[str, Tensor]:
    """Numbers of a `Shift` from the rollout to the present transitions of some edges: "squares" and "std", each [E]."""
    shift = Shift.between(trajectories.mean[edges.row].detach(), transition)
    return {"squares": shift.squares, "std": shift.std}


@attrs.frozen
class RatioNorm:
    """Importance weights of paths that do not depend on the noise scale of a step.

    For samples of the old policy, the log-ratio of a step has the mean -b, and its standard deviation grows as the noise shrinks. Both are
    removed, and the mean over the steps of a path is clipped:

        u = (l - l_old + b) c,        w = clip(exp(mean over steps u), 1 - clip, 1 + clip),   without gradient

        density     b                           c
        "mean"      <(mu - mu_old)^2> / 2 n^2   n
        "sum"       D <(mu - mu_old)^2> / 2 n^2 n / D
        "squared"   <(mu - mu_old)^2>           1 / 2 n

    n is the standard deviation of the step. In every convention u = <z (mu - mu_old)>, where z is the noise of the step. Its mean under
    the old policy is 0.

    Args:
        clip: half width of the interval of the weights

    Reference: GRPO-Guard, arXiv:2510.22319; TMPO (arXiv:2605.10983) uses it as weights.
    """

    clip: float = attrs.field(default=0.2, validator=[attrs.validators.gt(0.0), attrs.validators.lt(1.0)])

    def normalized(self, log_ratio: Tensor, old_mean: Tensor, transition: Gaussian) -> Tensor:
        """Normalised log-ratio u of each edge, with the gradients of the arguments: [E].

        Args:
            log_ratio: [E] l - l_old
            old_mean: [E, *] mu_old
            transition: transition of each edge under the current weights
        """
        return Shift.between(old_mean, transition).normalized(log_ratio)

    @torch.no_grad()
    def weights(self, log_ratio: Tensor, old_mean: Tensor, transition: Gaussian, path_mean: PathMean) -> Tensor:
        """Importance weight w of each path: [K]."""
        return self.weights_of(Shift.between(old_mean, transition), log_ratio, path_mean)

    @torch.no_grad()
    def weights_of(self, shift: Shift, log_ratio: Tensor, path_mean: PathMean) -> Tensor:
        """Importance weight w of each path, from the numbers of a `Shift`: [K]."""
        return path_mean(shift.normalized(log_ratio)).exp().clamp(1 - self.clip, 1 + self.clip)


@attrs.frozen
class Ratio:
    """Transforms the log-ratio of a path, log p_theta(tau) - log p_old(tau), before it enters a clipped surrogate.

    Args:
        per_dimension: divide a "sum" log-density by the number of latent dimensions. Without this, one update moves a path of 65,536
            dimensions by many nats, and every ratio would be clipped
        centered: subtract the group's mean, without gradient, so that a drift common to all samples of a prompt clips none of them. TMPO's
            release does so. The value of the loss then ignores such a drift, the gradient does not
        limit: clamp the log-ratio to +- limit; None does not clamp
    """

    per_dimension: bool = False
    centered: bool = False
    limit: float | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.gt(0.0)))

    def __call__(self, log_ratio: Tensor, group: Tensor, density: str, size: int) -> Tensor:
        """Transform log-ratios: [K] -> [K].

        Args:
            log_ratio: [K] log-ratio of each path
            group: [K] prompt group of each path
            density: log-density convention of the kernel
            size: latent dimensions D
        """
        if self.per_dimension and density == "sum":
            log_ratio = log_ratio / size
        if self.centered:
            log_ratio = log_ratio - group_mean(log_ratio, group).detach()
        return log_ratio if self.limit is None else log_ratio.clamp(-self.limit, self.limit)
