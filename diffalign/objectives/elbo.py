"""Log-ratios of finished samples, estimated by their denoising errors.

Legend: K samples, D latent dimensions, E independent estimates of each sample, U units.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import attrs
import torch
from torch import Tensor

from diffalign.core import Outline, ScoredBatch
from diffalign.core.words import allowed_word

from .draws import Draws
from .forward import ForwardBatch
from .noised import NoisedSamples, places, prompts

Weighting = Literal["likelihood", "flow", "clean", "noise"]
"""Weight w(sigma) of the error of a velocity; the table of `ELBO` has the formulas."""

_WEIGHTS: Mapping[str, tuple[float, float]] = MappingProxyType(
    {"likelihood": (-1.0, 1.0), "flow": (0.0, 0.0), "clean": (2.0, 0.0), "noise": (0.0, 2.0)}
)
"""Powers of sigma and of 1 - sigma in w."""


@attrs.frozen
class ELBO:
    """Evidence lower bound of a finished sample, by which the log-ratio of two policies is estimated without a trajectory.

        s(x_0) = integral over sigma in [sigma_min, sigma_max] of w(sigma) E_e[ ||v_ref(x_sigma) - v||^2 - ||v_theta(x_sigma) - v||^2 ]
        x_sigma = (1 - sigma) x_0 + sigma e,   v = e - x_0,   norms are sums over the D dimensions,   sigma_max the first of the grid

        weighting      w(sigma)             error that is weighted evenly
        "likelihood"   (1 - sigma) / sigma  none; s is in nats
        "flow"         1                    of the velocity, as in pretraining
        "clean"        sigma^2              of the clean sample
        "noise"        (1 - sigma)^2        of the noise

    With "likelihood", minus the integral is a bound of log p(x_0), up to a constant: w sigma^2 = -d/dsigma (SNR) / 2 with SNR =
    (1 - sigma)^2 / sigma^2, the weight of the clean error in the diffusion bound. For a velocity that is the exact flow of its
    distribution the bound is tight, and with sigma_min = 0 s is log p_theta(x_0) - log p_ref(x_0). With sigma_min > 0 it is the mean, over
    the noise of level sigma_min, of the log-ratio of the distributions noised to that level. With another weighting a temperature is not
    in nats.

    The integral is a mean over random levels. Both policies always get the same noise, without which the estimate would be of no use. The
    further rules leave its mean: strata and pairs lower its variance at equal rows, by `python -m benchmarks study elbo`. Noise
    that the samples of a prompt share lowered that of their differences only where neither was used.

    Args:
        levels: noise levels of an estimate
        weighting: see above
        sigma_min: least noise level, in (0, 1), below the first of the rollout's grid. Smaller levels measure fine detail, which networks
            learn badly and few steps draw badly, and "likelihood" weighs it most: with 0.05 runs on handwriting left the real pictures
        shared: whether all samples of a prompt have the same levels and noise, of which a part cancels in their differences
        antithetic: whether each level is used with a noise e and with -e, which cancels odd terms and takes two network rows
        stratified: whether each level is drawn from its own part of [sigma_min, sigma_max]

    Raises:
        ValueError: a number is out of range.

    Reference: Kingma et al., arXiv:2107.00630 (bound); Kong et al., arXiv:2302.03792 (tight for the exact denoiser); as a likelihood for
        reinforcement, arXiv:2602.04663.
    """

    levels: int = attrs.field(default=2, validator=attrs.validators.ge(1))
    weighting: Weighting = attrs.field(default="likelihood", validator=allowed_word)
    sigma_min: float = attrs.field(default=0.3, validator=[attrs.validators.gt(0.0), attrs.validators.lt(1.0)])
    shared: bool = False
    antithetic: bool = True
    stratified: bool = True

    @property
    def units(self) -> int:
        """Noised units of an estimate."""
        return self.levels * (2 if self.antithetic else 1)

    def weight(self, sigma: Tensor) -> Tensor:
        """Weight w of each noise level [U]: [U], float64."""
        power, rest = _WEIGHTS[self.weighting]
        return sigma.double().pow(power) * (1 - sigma.double()).clamp(min=0).pow(rest)

    def log_ratio(self, forward: ForwardBatch, baseline: Tensor, error: Tensor) -> Tensor:
        """Log-ratio s of each sample, E estimates of it: [E, K], with the gradient of `error`.

        Args:
            forward: noised samples, drawn by `Estimates`
            baseline: [U] mean squared errors of the other policy
            error: [U] mean squared errors of the policy
        """
        trajectories = forward.batch.trajectories
        scale = (trajectories.sigmas[0].double() - self.sigma_min) * trajectories.latents[0].numel() / self.units
        each = scale * self.weight(forward.samples.sigma.flatten()) * (baseline - error)
        return each.view(-1, forward.samples.levels // self.units, self.units).sum(dim=2).T


@attrs.frozen
class Estimates(Draws):
    """Draws the levels and noises of several independent estimates of each sample.

    Args:
        bound: rule of an estimate
        count: number E of estimates. Two allow products whose mean has no variance in it: E[a b] = E[a] E[b]
    """

    bound: ELBO
    count: int = 2

    @property
    def units(self) -> int:
        return self.count * self.bound.units

    def __call__(self, batch: ScoredBatch, name: str, objective: str) -> NoisedSamples:
        bound, trajectories = self.bound, batch.trajectories
        place = places(trajectories)
        drawn = torch.stack(
            [
                torch.from_numpy(batch.streams.generator(f"{name}/levels", prompt, 0 if bound.shared else sample).random(self._shape))
                for prompt, sample in zip(prompts(trajectories), place.tolist(), strict=True)
            ]
        )
        if bound.stratified:
            drawn = (drawn + torch.arange(bound.levels)) / bound.levels
        sigma = (bound.sigma_min + (float(trajectories.sigmas[0]) - bound.sigma_min) * drawn).flatten(1)
        if bound.antithetic:
            sigma = sigma.repeat_interleave(2, dim=1)
        return NoisedSamples(batch, sigma.to(trajectories.sigmas), place, bound.shared, name, bound.antithetic)

    @property
    def _shape(self) -> tuple[int, int]:
        return self.count, self.bound.levels

    def require(self, outline: Outline, objective: str) -> None:
        """Accept grids that begin above `sigma_min` and end below it: the levels do not come from them."""
        for first, last in ((float(grid[0]), float(grid[-1])) for grid in outline.grids):
            if not self.bound.sigma_min < first:
                raise ValueError(
                    f"{objective}.bound.sigma_min must lie below the first noise level of the rollout, {first:g}; got "
                    f"{self.bound.sigma_min:g}"
                )
            if not last < self.bound.sigma_min:
                raise ValueError(
                    f"{objective}.bound.sigma_min must lie above the last noise level of the rollout, {last:g}, at which its samples are "
                    f"drawn; got {self.bound.sigma_min:g}"
                )
