"""Policy around another one: it hands on everything that it does not change."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .forking import view_of
from .policy import Policy
from .transition import TransitionKernel
from .types import Condition, Prompt, Size


class PolicyAround(Policy):
    """Policy that hands every call on to the policy inside, and shares its weights and its row counter.

    A subclass overrides what it changes. Its `fork` puts the same wrapper around a fork of the inner policy.

    Args:
        policy: the policy inside
        kernel: the step rule; None takes the inner policy's
    """

    def __init__(self, policy: Policy, kernel: TransitionKernel | None = None) -> None:
        super().__init__(kernel or policy.kernel, policy.latent_shape)
        self.policy = policy
        self.counter = policy.counter

    def encode(self, prompts: Sequence[Prompt]) -> Condition:
        return self.policy.encode(prompts)

    def encode_negative(self, text: str) -> Condition:
        return self.policy.encode_negative(text)

    def decode(self, latents: Tensor) -> Tensor:
        return self.policy.decode(latents)

    def prior(self, noise: Tensor) -> Tensor:
        return self.policy.prior(noise)

    def sigmas(self, steps: int) -> Tensor:
        return self.policy.sigmas(steps)

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        return self.policy.velocity(latents, sigma, condition)

    @property
    def no_guidance(self) -> float:
        return self.policy.no_guidance

    def guide(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        return self.policy.guide(positive, negative, scale)

    @property
    def without_delta(self) -> bool:
        return self.policy.without_delta

    def sized(self, size: Size | None) -> Policy:
        inner = self.policy.sized(size)
        return self if inner is self.policy else view_of(self, policy=inner, latent_shape=inner.latent_shape)

    def require(self, prompts: Sequence[Prompt]) -> None:
        self.policy.require(prompts)

    @property
    def examples(self) -> tuple[Prompt, Prompt] | None:
        return self.policy.examples

    @property
    def step_counts(self) -> tuple[int, ...]:
        return self.policy.step_counts

    def at(self, steps: int) -> Policy:
        inner = self.policy.at(steps)
        return self if inner is self.policy else view_of(self, policy=inner)

    def own_parameters(self) -> dict[str, nn.Parameter]:
        return {f"policy.{name}": parameter for name, parameter in self.policy.own_parameters().items()}

    @property
    def precision(self) -> torch.dtype:
        return self.policy.precision

    @property
    def reproducible(self) -> bool:
        return self.policy.reproducible

    @property
    def device(self) -> torch.device:
        return self.policy.device
