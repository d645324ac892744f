"""Noise grids, and numbers that change over a run."""

import math
from abc import ABC, abstractmethod

import attrs
import torch
from torch import Tensor

from .types import Progress


def shifted_sigmas(steps: int, shift: float = 1.0) -> Tensor:
    """Noise grid sigma_i = a u_i / (1 + (a - 1) u_i) with u_i = 1 - i / steps: [steps + 1], from 1 to 0, float32.

    Args:
        steps: at least 1
        shift: a > 0; 1 is the uniform grid, larger spends more steps on noise (arXiv:2403.03206, section 5.3.2)
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps}")
    if shift <= 0:
        raise ValueError(f"shift must be positive; got {shift}")
    uniform = 1 - torch.arange(steps + 1, dtype=torch.float64) / steps
    return (shift * uniform / (1 + (shift - 1) * uniform)).float()


@attrs.frozen
class ShiftedGrid:
    """Noise grid of `shifted_sigmas`, for a policy whose scheduler wastes a step just above sigma 0 (diffusers' schedulers do).

    Args:
        shift: see `shifted_sigmas`
    """

    shift: float = attrs.field(default=1.0, validator=attrs.validators.gt(0))

    def __call__(self, steps: int) -> Tensor:
        return shifted_sigmas(steps, self.shift)


def resolution_shift(tokens: int, base: tuple[int, float] = (256, 0.5), top: tuple[int, float] = (4096, 1.15)) -> float:
    """Shift a = exp(mu), with mu linear in the number of image tokens through two points, also outside them (FLUX.1)."""
    (low, low_mu), (high, high_mu) = base, top
    return math.exp(low_mu + (high_mu - low_mu) * (tokens - low) / (high - low))


class Scalar(ABC):
    """A number as a function of progress."""

    @abstractmethod
    def __call__(self, progress: Progress) -> float:
        """Its value at this step."""


class Foreseen(Scalar):
    """Scalar that depends on the step and the length of the run alone, so that its values are known before the run."""


@attrs.frozen
class Constant(Foreseen):
    """Always `value`."""

    value: float

    def __call__(self, progress: Progress) -> float:
        return self.value


@attrs.frozen
class Linear(Foreseen):
    """Linear change from `start` to `end` over `steps` steps, then `end`."""

    start: float
    end: float
    steps: int = attrs.field(validator=attrs.validators.ge(1))

    def __call__(self, progress: Progress) -> float:
        return self.start + (self.end - self.start) * min(1.0, progress.step / self.steps)


@attrs.frozen
class Ramp(Foreseen):
    """Linear growth `start` + `rate` n at step n, at most `limit`."""

    start: float
    rate: float
    limit: float

    def __call__(self, progress: Progress) -> float:
        return min(self.limit, self.start + self.rate * progress.step)


@attrs.frozen
class Delayed(Foreseen):
    """`before` in the first `steps` steps, then `after`."""

    before: float
    after: float
    steps: int = attrs.field(validator=attrs.validators.ge(0))

    def __call__(self, progress: Progress) -> float:
        return self.before if progress.step < self.steps else self.after


@attrs.frozen
class Cosine(Foreseen):
    """Change from `start` to `end` along half a cosine over the whole run."""

    start: float
    end: float

    def __call__(self, progress: Progress) -> float:
        return self.end + (self.start - self.end) * 0.5 * (1 + math.cos(math.pi * progress.fraction))


def scalar(value: "Scalar | float") -> Scalar:
    """A plain number as a constant schedule."""
    return value if isinstance(value, Scalar) else Constant(float(value))
