"""The policy: one set of weights of p(x_next | x, c)."""

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
    """Network rows (samples) and calls that a policy has evaluated.

    Args:
        largest: rows of the largest call since somebody set it to 0
    """

    rows: int = 0
    calls: int = 0
    largest: int = 0

    def add(self, rows: int) -> None:
        self.largest = max(self.largest, rows)
        self.rows += rows
        self.calls += 1


class Policy(nn.Module, ABC):
    """p(x_next | x, c): one set of weights of a velocity field, with its step rule, its noise grid and its data ends.

    Reference, old, teacher and average weights are other policies, made by `fork`. A subclass calls `super().__init__`, and
    `self.counter.add(rows)` wherever it evaluates its network.

    Args:
        kernel: the step rule
        latent_shape: of one sample, [*]
    """

    def __init__(self, kernel: TransitionKernel, latent_shape: Sequence[int]) -> None:
        super().__init__()
        self.kernel = kernel
        self.latent_shape = tuple(latent_shape)
        self.counter = RowCounter()
        self.shares_tensors = False

    @abstractmethod
    def encode(self, prompts: Sequence[Prompt]) -> Condition:
        """P prompts -> their condition, with ids 0..P-1."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """[K, *] -> images [K, 3, H, W] in [0, 1]; called in chunks."""

    @abstractmethod
    def prior(self, noise: Tensor) -> Tensor:
        """Unit noise [B, *] -> latents [B, *] at sigmas[0], on the policy's device."""

    @abstractmethod
    def sigmas(self, steps: int) -> Tensor:
        """The family's own noise grid for a number of steps: [steps + 1], decreasing to 0, float32."""

    @abstractmethod
    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """V = noise - x_0 as predicted at [B, *], [B] and B conditions: [B, *]."""

    @abstractmethod
    def fork(self, *, trainable: bool = False, pristine: bool = False) -> Self:
        """A policy of its own with equal weights, which shares the tensors that are not trained.

        Args:
            trainable: whether its own tensors require gradients
            pristine: without the LoRA delta; refused where there is none
        """

    def sized(self, size: Size | None) -> "Policy":
        """The same weights for pictures of another size: with the latent shape and the noise grid that belong to it.

        A rollout takes what its prompts ask for (`Condition.size`). It is a view and no fork, and computes the same velocity: a replay of
        the rollout by the policy itself is exact.

        Args:
            size: height and width in pixels; None is the policy's own

        Raises:
            ValueError: a size that it cannot draw; most policies draw one alone.
        """
        if size is not None:
            raise ValueError(
                f"{type(self).__name__} draws pictures of one size alone, and a prompt asks for {size[0]} x {size[1]} (height x width). "
                'Remove "height" and "width" from the prompts.'
            )
        return self

    def require(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts that it could not encode. The loop asks when it is built, of all prompts that it knows.

        Raises:
            ValueError: names the first of them, and what can be read.
        """

    @property
    def examples(self) -> tuple[Prompt, Prompt] | None:
        """Two prompts that the policy can read, for checks of it; None where it reads any text."""
        return None

    @property
    def step_counts(self) -> tuple[int, ...]:
        """The numbers of steps that the weights are trained for, the one at hand first; empty where any number will do."""
        return ()

    def at(self, steps: int) -> "Policy":
        """The same weights for trajectories of that number of steps: with its noise grid, and its condition where it is one.

        A sampler that varies the number asks for it, and encodes the prompts by the view. Any policy whose grid takes every number is
        its own view.

        Raises:
            ValueError: a number that a few-step student does not serve.
        """
        return self

    def transition(self, latents: Tensor, sigma: Tensor, sigma_next: Tensor, condition: Condition, noise_level: Tensor) -> Gaussian:
        """p(x_next | x): the one place where rollout and replay make a step.

        Args:
            latents: [B, *]
            sigma, sigma_next: [B]
            condition: B rows
            noise_level: [B] eta, 0 = deterministic
        """
        return self.kernel.step(latents, self.velocity(latents, sigma, condition), sigma, sigma_next, noise_level)

    def encode_negative(self, text: str) -> Condition:
        """The text that guidance leads away from: one row. A model family may encode it in another way than a prompt."""
        return self.encode([Prompt(text)])

    @property
    def no_guidance(self) -> float:
        """The least scale of `guide`, with which it gives the positive velocity: what to compare a scale with."""
        return 1.0

    def guide(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance (arXiv:2207.12598), negative + scale (positive - negative); a family may have its own rule.

        One whose rule gives the positive velocity at another scale than 1 says so in `no_guidance`.
        """
        return negative + scale * (positive - negative)

    def predict_clean(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """x_0 = x - sigma v: [B, *]."""
        return latents - expand(sigma, latents) * self.velocity(latents, sigma, condition)

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that a checkpoint must hold, by name: all of them, unless some are shared with other policies for good."""
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
        """The least precise type that the network computes in, as far as its parameters tell: how exact a replay can be."""
        types = {parameter.dtype for parameter in self.parameters() if parameter.is_floating_point()}  # quantised ones are stored alone
        return min(types, key=lambda dtype: dtype.itemsize, default=torch.float32)

    @property
    def reproducible(self) -> bool:
        """True if the same call gives the same bits again. A compiled network may meet another program of itself."""
        return True

    @property
    def device(self) -> torch.device:
        """Where latents live."""
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
