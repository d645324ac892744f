"""Policy: one set of weights of p(x_next | x, c)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Self

import attrs
import torch
from torch import Tensor, nn

from .transition import Gaussian, TransitionKernel, expand
from .types import Condition, Prompt, Size


@attrs.define
class RowCounter:
    """Counts the network rows (samples) and calls that a policy has evaluated.

    Args:
        largest: rows of the largest call since it was last set to 0
        tracked: rows of the calls that ran with autograd on
    """

    rows: int = 0
    calls: int = 0
    largest: int = 0
    tracked: int = 0

    def add(self, rows: int) -> None:
        self.largest = max(self.largest, rows)
        self.rows += rows
        self.calls += 1
        self.tracked += rows * torch.is_grad_enabled()


class Policy(nn.Module, ABC):
    """Model p(x_next | x, c): one set of weights of a velocity field, with its step rule, noise grid, encoder and decoder.

    Reference, old, teacher and average weights are other policies, made by `fork`. A subclass calls `super().__init__`, and
    `self.counter.add(rows)` wherever it evaluates its network.

    Args:
        kernel: the step rule
        latent_shape: shape of one sample, [*]
    """

    def __init__(self, kernel: TransitionKernel, latent_shape: Sequence[int]) -> None:
        super().__init__()
        self.kernel = kernel
        self.latent_shape = tuple(latent_shape)
        self.counter = RowCounter()
        self.shares_tensors = False

    @abstractmethod
    def encode(self, prompts: Sequence[Prompt]) -> Condition:
        """Encode P prompts; the condition has the ids 0..P-1."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents [K, *] to images [K, 3, H, W] in [0, 1]. Called in chunks."""

    @abstractmethod
    def prior(self, noise: Tensor) -> Tensor:
        """Turn unit noise [B, *] into latents [B, *] at sigmas[0], on the policy's device."""

    @abstractmethod
    def sigmas(self, steps: int) -> Tensor:
        """Noise grid of the model family for a number of steps: [steps + 1], decreasing to 0, float32."""

    @abstractmethod
    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Predict the velocity v = noise - x_0 at latents [B, *], sigma [B] and B conditions: [B, *]."""

    @abstractmethod
    def fork(self, *, trainable: bool = False, pristine: bool = False) -> Self:
        """Make another policy with equal weights, which shares the tensors that are not trained.

        Args:
            trainable: whether its own tensors require gradients
            pristine: leave out the LoRA update; an error if there is no LoRA
        """

    @property
    def without_delta(self) -> bool:
        """True if a pristine fork computes the same now: there are LoRA adapters, and they add nothing yet. Such a fork skips them."""
        return False

    def sized(self, size: Size | None) -> "Policy":
        """View of the same weights for images of another size, with the latent shape and the noise grid of that size.

        A rollout takes the size that its prompts ask for (`Condition.size`). A view is not a fork and computes the same velocity: a replay
        of the rollout by the policy itself is exact.

        Args:
            size: height and width in pixels; None means the policy's own size

        Raises:
            ValueError: the policy cannot draw this size; most policies draw only one.
        """
        if size is not None:
            raise ValueError(
                f"{type(self).__name__} draws images of one size only, but a prompt asks for {size[0]} x {size[1]} (height x width). "
                'Remove "height" and "width" from the prompts.'
            )
        return self

    def require(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts that the policy cannot encode. The loop calls this when it is built, with all prompts that it knows.

        Raises:
            ValueError: names the first of them, and what can be read.
        """

    @property
    def examples(self) -> tuple[Prompt, Prompt] | None:
        """Two prompts that the policy can read, for checks; None if it reads any text."""
        return None

    @property
    def step_counts(self) -> tuple[int, ...]:
        """Numbers of steps that the weights are trained for, the current one first; empty if any number is allowed."""
        return ()

    def at(self, steps: int) -> "Policy":
        """View of the same weights for trajectories of that number of steps: with its noise grid, and its condition if it depends on it.

        A sampler that varies the number of steps calls this and encodes the prompts by the view. A policy that allows every number of
        steps returns itself.

        Raises:
            ValueError: a few-step student is not trained for this number.
        """
        return self

    def transition(self, latents: Tensor, sigma: Tensor, sigma_next: Tensor, condition: Condition, noise_level: Tensor) -> Gaussian:
        """Distribution of the next state, p(x_next | x). Rollout and replay both make their steps here, and nowhere else.

        Args:
            latents: [B, *]
            sigma, sigma_next: [B]
            condition: B rows
            noise_level: [B] eta, 0 = deterministic
        """
        return self.kernel.step(latents, self.velocity(latents, sigma, condition), sigma, sigma_next, noise_level)

    def encode_negative(self, text: str) -> Condition:
        """Encode the text that guidance leads away from: one row. A model family may encode it in another way than a prompt."""
        return self.encode([Prompt(text)])

    @property
    def no_guidance(self) -> float:
        """Scale at which `guide` returns the positive velocity, that is, no guidance."""
        return 1.0

    def guide(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance (arXiv:2207.12598), negative + scale (positive - negative); a family may have its own rule.

        If that rule returns the positive velocity at another scale than 1, the family overrides `no_guidance`.
        """
        return negative + scale * (positive - negative)

    def predict_clean(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Predict the clean sample x_0 = x - sigma v: [B, *]."""
        return latents - expand(sigma, latents) * self.velocity(latents, sigma, condition)

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that a checkpoint must hold, by name: all, except those that are always shared with other policies."""
        return dict(self.named_parameters())

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that require gradients, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    @torch.no_grad()
    def lerp_(self, other: "Policy", weight: float) -> None:
        """Move the tensors that are not shared towards those of `other`: w <- w + weight (other - w)."""
        mine, theirs = dict(self.named_parameters()), dict(other.named_parameters())
        if mine.keys() != theirs.keys():
            odd = sorted(mine.keys() ^ theirs.keys())
            raise ValueError(f"lerp_ needs a fork of the same policy; {len(odd)} parameters differ in name (first: {odd[0]!r})")
        for name, parameter in mine.items():
            if parameter is not theirs[name]:
                parameter.lerp_(theirs[name].to(parameter.dtype), weight)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        self._refuse_if_shared("requires_grad_")
        return super().requires_grad_(requires_grad)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._refuse_if_shared("to")
        moved: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return moved

    def _refuse_if_shared(self, verb: str) -> None:
        if any(module.shares_tensors for module in self.modules() if isinstance(module, Policy)):  # a wrapper has its policy's
            raise RuntimeError(
                f"{type(self).__name__}.{verb}() would change every fork, because forks share tensors. Move and cast a policy before "
                "its first fork."
            )

    @property
    def precision(self) -> torch.dtype:
        """Least precise type among the floating parameters. It limits how exact a replay can be."""
        types = {parameter.dtype for parameter in self.parameters() if parameter.is_floating_point()}  # integers only store quantised ones
        return min(types, key=lambda dtype: dtype.itemsize, default=torch.float32)

    @property
    def reproducible(self) -> bool:
        """True if the same call gives the same bits again. A compiled network may be compiled anew between two calls."""
        return True

    @property
    def device(self) -> torch.device:
        """Device of the latents."""
        parameter = next(self.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device


def require_frozen(policy: Policy, role: str) -> None:
    """Refuse a policy whose weights an optimizer or an accidental gradient could move.

    Raises:
        ValueError: some parameters require gradients.
    """
    trainable = policy.trainable_parameters()
    if trainable:
        raise ValueError(
            f"{role} must be frozen: {len(trainable)} parameters require grad (first: {next(iter(trainable))!r}). "
            "Build it with policy.fork()."
        )
