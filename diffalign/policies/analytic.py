"""Policy in closed form: the exact velocity of a Gaussian mixture, without a network."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from diffalign.core import CPS, Condition, Policy, Prompt, TransitionKernel, shifted_sigmas
from diffalign.core.transition import expand


class GaussianMixturePolicy(Policy):
    """Exact flow of the data distribution sum_i w_i N(m_i, c^2 I), the same for all prompts.

        V = (1 - sigma)^2 c^2 + sigma^2,   r_i ~ w_i N(x; (1 - sigma) m_i, V I)
        E[x_0 | x] = sum_i r_i (m_i + (1 - sigma) c^2 / V (x - (1 - sigma) m_i)),   v = (x - E[x_0 | x]) / sigma

    Means and log-weights are its parameters, so it can be trained like any other policy. A step takes microseconds.

    Args:
        means: [M, D]
        scale: c >= 0, the same for all components
        weights: [M] positive; equal by default
        kernel: CPS by default
        shift: shift of the sigma grid
        extent: decode maps [-extent, extent] to [0, 1]
    """

    def __init__(
        self,
        means: Tensor | Sequence[Sequence[float]],
        scale: float,
        weights: Tensor | Sequence[float] | None = None,
        kernel: TransitionKernel | None = None,
        shift: float = 1.0,
        extent: float = 8.0,
    ) -> None:
        means = torch.as_tensor(means).clone()
        super().__init__(kernel or CPS(), means.shape[1:])
        weights = means.new_ones(len(means)) if weights is None else torch.as_tensor(weights, dtype=means.dtype)
        self.means = nn.Parameter(means)
        self.log_weights = nn.Parameter((weights / weights.sum()).log())
        self.scale, self.shift, self.extent = scale, shift, extent

    def encode(self, prompts: Sequence[Prompt]) -> Condition:
        return Condition(tuple(prompts), torch.arange(len(prompts)), {})

    def decode(self, latents: Tensor) -> Tensor:
        """Turn latents [K, D <= 3] into images [K, 3, 1, 1]: each coordinate is one channel, not clipped."""
        channels = latents / (2 * self.extent) + 0.5
        return torch.nn.functional.pad(channels, (0, 3 - channels.shape[1]))[:, :, None, None]

    def prior(self, noise: Tensor) -> Tensor:
        return noise.to(self.means.dtype).to(self.device)

    def sigmas(self, steps: int) -> Tensor:
        return shifted_sigmas(steps, self.shift).to(self.means.dtype)

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        self.counter.add(len(latents))
        keep = expand(1 - sigma, latents)
        variance = keep.square() * self.scale**2 + expand(sigma, latents).square()
        offset = latents[:, None] - keep[:, None] * self.means  # [B, M, D]
        logits = self.log_weights - offset.square().sum(-1) / (2 * variance)
        share = logits.softmax(dim=1)[:, :, None]
        clean = (share * (self.means + (keep * self.scale**2 / variance)[:, None] * offset)).sum(dim=1)
        return (latents - clean) / expand(sigma, latents)

    def fork(self, *, trainable: bool = False, pristine: bool = False) -> Self:
        if pristine:
            raise ValueError("fork(pristine=True) needs LoRA adapters to leave out; a Gaussian mixture has none. Fork it before training.")
        twin = type(self)(self.means.detach(), self.scale, None, self.kernel, self.shift, self.extent)
        twin.requires_grad_(trainable)
        twin.lerp_(self, 1.0)  # copied here, because the constructor normalises the weights
        return twin
