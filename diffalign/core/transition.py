"""One denoising step as a Gaussian, and the rules that compute it from a velocity.

Legend: B rows, * latent dimensions, D their number; eta is the noise level of a step.
"""

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from .types import Density
from .words import allowed_word


@attrs.frozen(eq=False)
class Gaussian:
    """Distribution p(x_next | x): an isotropic Gaussian per row, with its log-density convention.

    log_prob(y) =
        "sum"      -||y - mean||^2 / (2 std^2) - D (ln std + ln(2 pi) / 2)      the true density
        "mean"     that divided by D (Flow-GRPO, arXiv:2505.05470)
        "squared"  -||y - mean||^2 / D, without variance (the TMPO release, arXiv:2605.10983)

    Args:
        mean: [B, *]
        std: [B], standard deviation of each latent dimension; 0 means a single point, which has no log-density
        density: the convention
        std_floor: least std in the log-density; None means no limit
        deviation_limit: in the log-density, y - mean is clamped to +- this many std, elementwise; None does not clamp
    """

    mean: Tensor  # [B, *]
    std: Tensor  # [B]
    density: Density = attrs.field(validator=allowed_word)
    std_floor: float | None = None
    deviation_limit: float | None = None

    def sample(self, noise: Tensor) -> Tensor:
        """Sample mean + std * noise, for unit noise [B, *]."""
        return self.mean + expand(self.std, self.mean) * noise

    def select(self, index: Tensor) -> "Gaussian":
        """Select the rows `index` [B], in any order and as often as wanted."""
        return attrs.evolve(self, mean=self.mean[index], std=self.std[index])

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of `value` [B, *], in float64: [B]. Every row must have std > 0."""
        size = self.mean[0].numel()
        std = self.std if self.std_floor is None else self.std.clamp(min=self.std_floor)
        deviation = value - self.mean
        if self.deviation_limit is not None:
            bound = expand(self.deviation_limit * std, deviation)
            deviation = deviation.clamp(-bound, bound)
        squares = deviation.flatten(1).square().sum(dim=1, dtype=torch.float64)
        if self.density == "squared":
            return -squares / size
        std = std.double()
        total = -squares / (2 * std.square()) - size * (std.log() + math.log(2 * math.pi) / 2)
        return total if self.density == "sum" else total / size


def expand(per_row: Tensor, like: Tensor) -> Tensor:
    """Reshape [B] to [B, 1, ...], with the dtype of `like` [B, *]."""
    return per_row.reshape(-1, *(1,) * (like.ndim - 1)).to(like.dtype)


class TransitionKernel(ABC):
    """Rule that turns a velocity into the distribution of the next state. Its standard deviation depends only on the sigmas and eta."""

    density: Density = "mean"
    """Log-density convention of the transitions."""

    largest_eta: ClassVar[float] = math.inf
    """Largest noise level for which the rule holds."""

    @abstractmethod
    def step(self, latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, noise_level: Tensor) -> Gaussian:
        """Compute the transition from sigma to sigma_next.

        Args:
            latents, velocity: [B, *]
            sigma, sigma_next: [B], sigma > sigma_next >= 0
            noise_level: [B] eta, 0 <= eta <= largest_eta; rows with eta = 0 take the Euler step with std 0
        """


@attrs.frozen
class Euler(TransitionKernel):
    """Euler step x' = x + (sigma' - sigma) v, without noise.

    Raises:
        ValueError: an eta is above 0.
    """

    def step(self, latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, noise_level: Tensor) -> Gaussian:
        if bool((noise_level > 0).any()):
            raise ValueError(f"Euler has no noise, so every eta must be 0; got {noise_level.max().item():g}. Use CPS or FlowSDE.")
        mean = latents + expand(sigma_next - sigma, latents) * velocity
        return Gaussian(mean, torch.zeros_like(sigma), "mean")


@attrs.frozen
class CPS(TransitionKernel):
    """Coefficient-preserving sampling: part of the predicted noise is exchanged for fresh noise.

        x_0 = x - sigma v,   noise = x + (1 - sigma) v,   s = sigma' sin(pi eta / 2)
        x'  = (1 - sigma') x_0 + sqrt(sigma'^2 - s^2) noise + s eps

    eta in [0, 1]; eta = 0 is the Euler step, and a step to sigma' = 0 has no noise at any eta. Above 1 the predicted noise would enter with
    the wrong sign, so samplers refuse it.

    Args:
        density: log-density convention of the transitions

    Reference: Wang and Yu, arXiv:2509.05952.
    """

    density: Density = attrs.field(default="mean", validator=allowed_word)
    largest_eta: ClassVar[float] = 1.0

    def step(self, latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, noise_level: Tensor) -> Gaussian:
        angle = noise_level * (math.pi / 2)
        kept = sigma_next * angle.cos()
        clean = latents - expand(sigma, latents) * velocity
        noise = latents + expand(1 - sigma, latents) * velocity
        mean = expand(1 - sigma_next, latents) * clean + expand(kept, latents) * noise
        return Gaussian(mean, sigma_next * angle.sin(), self.density)


@attrs.frozen
class FlowSDE(TransitionKernel):
    """The Euler-Maruyama step of the SDE with the marginals of the flow.

        s   = eta sqrt(sigma / (1 - sigma)),   d = sigma' - sigma < 0
        x'  = x (1 + s^2 d / (2 sigma)) + v (1 + s^2 (1 - sigma) / (2 sigma)) d + s sqrt(-d) eps

    It is singular at sigma = 1. eta = 0 takes the Euler step.

    Args:
        density: log-density convention of the transitions
        sigma_max: replaces larger sigmas in s (Flow-GRPO's code takes the grid's second sigma); None refuses a step from sigma 1
        std_floor: least std in the log-density (0.01 in TMPO's release). It biases the density and is there to reproduce that code
        deviation_limit: limit of |y - mean| in the log-density, in std (10 in TMPO's release); there to reproduce that code

    Raises:
        ValueError: a stochastic step starts at sigma = 1, and there is no `sigma_max`.

    Reference: Liu et al., Flow-GRPO, arXiv:2505.05470.
    """

    density: Density = attrs.field(default="mean", validator=allowed_word)
    sigma_max: float | None = attrs.field(
        default=None, validator=attrs.validators.optional([attrs.validators.gt(0.0), attrs.validators.lt(1.0)])
    )
    std_floor: float | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.gt(0.0)))
    deviation_limit: float | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.gt(0.0)))

    def step(self, latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, noise_level: Tensor) -> Gaussian:
        noisy = noise_level > 0
        capped = sigma if self.sigma_max is None else sigma.clamp(max=self.sigma_max)
        if self.sigma_max is None and bool((noisy & (capped >= 1)).any()):
            raise ValueError(
                "FlowSDE is singular at sigma = 1, so a stochastic step must start below; got a step from sigma 1. "
                "Start the stochastic steps at step 1, or give FlowSDE(sigma_max=...)."
            )
        capped = torch.where(noisy, capped, 0.5)  # any value will do: these rows are multiplied by eta = 0
        scale = noise_level * (capped / (1 - capped)).sqrt()
        delta = sigma_next - sigma
        drift = scale.square() / (2 * sigma)
        mean = latents * expand(1 + drift * delta, latents) + velocity * expand((1 + drift * (1 - sigma)) * delta, latents)
        return Gaussian(mean, scale * (-delta).sqrt(), self.density, self.std_floor, self.deviation_limit)
