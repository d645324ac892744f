"""Solvers of the flow's ODE of an order above one, for rollouts whose ends alone count.

Legend: x' and sigma' are the state and the noise level after a step, v(x, sigma) the velocity, T steps.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable

import attrs
import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
"""Function from states [B, *] and a noise level [] to velocities [B, *]: one network evaluation of each row."""


class Solver(ABC):
    """Rule that integrates dx / dsigma = v from noise to data."""

    @abstractmethod
    def evaluations(self, steps: int) -> tuple[int, ...]:
        """Network evaluations of each of the T steps."""

    @abstractmethod
    def solve(self, velocity: Velocity, latents: Tensor, sigmas: Tensor) -> Tensor:
        """Integrate to the end: [B, *].

        Args:
            velocity: the field
            latents: [B, *] states at the first sigma
            sigmas: [T+1] noise grid, decreasing to 0
        """


@attrs.frozen
class Heun(Solver):
    """Heun's rule, of second order: x' = x + (sigma' - sigma) (v(x, sigma) + v(x_E, sigma')) / 2, x_E the end of the Euler step.

    The last step, to sigma' = 0, is an Euler step, as in diffusers' `FlowMatchHeunDiscreteScheduler`: networks are not trained at 0. So T
    steps take 2 T - 1 evaluations.
    """

    def evaluations(self, steps: int) -> tuple[int, ...]:
        return (2,) * (steps - 1) + (1,)

    def solve(self, velocity: Velocity, latents: Tensor, sigmas: Tensor) -> Tensor:
        for place, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
            here = velocity(latents, sigma)
            euler = latents + (following - sigma) * here
            last = place == len(sigmas) - 2
            latents = euler if last else latents + (following - sigma) * (here + velocity(euler, following)) / 2
        return latents


@attrs.frozen
class Midpoint(Solver):
    """Midpoint rule, of second order: x' = x + (sigma' - sigma) v(x_M, (sigma + sigma') / 2), x_M the end of half an Euler step.

    T steps take 2 T evaluations, the last of them above sigma 0.
    """

    def evaluations(self, steps: int) -> tuple[int, ...]:
        return (2,) * steps

    def solve(self, velocity: Velocity, latents: Tensor, sigmas: Tensor) -> Tensor:
        for sigma, following in itertools.pairwise(sigmas):
            middle = (sigma + following) / 2
            half = latents + (middle - sigma) * velocity(latents, sigma)
            latents = latents + (following - sigma) * velocity(half, middle)
        return latents


@attrs.frozen
class AdamsBashforth(Solver):
    """Adams-Bashforth rule of two steps, of second order, with one evaluation a step; the first step is an Euler step.

    x' = x + h (v + h / (2 h_before) (v - v_before)),   h = sigma' - sigma and h_before of the step before
    """

    def evaluations(self, steps: int) -> tuple[int, ...]:
        return (1,) * steps

    def solve(self, velocity: Velocity, latents: Tensor, sigmas: Tensor) -> Tensor:
        before: Tensor | None = None
        width = sigmas.diff()
        for place, sigma in enumerate(sigmas[:-1]):
            here = velocity(latents, sigma)
            slope = here if before is None else here + width[place] / (2 * width[place - 1]) * (here - before)
            latents, before = latents + width[place] * slope, here
        return latents


@attrs.frozen
class DPMSolver(Solver):
    """DPM-Solver++(2M) in the flow's noise levels: a multistep rule of second order on clean predictions, one evaluation a step.

        m = x - sigma v,   lambda = log((1 - sigma) / sigma),   r = (lambda - lambda_before) / (lambda' - lambda)
        x' = (sigma' / sigma) x + (1 - sigma' - (1 - sigma) sigma' / sigma) (m + (m - m_before) / (2 r))

    The first step and the last are of first order, which is the Euler step; so is the second if the grid begins at sigma 1, where lambda
    is infinite. Equal to diffusers' `DPMSolverMultistepScheduler` for flow predictions on the same grid.

    Reference: Lu et al., arXiv:2211.01095.
    """

    def evaluations(self, steps: int) -> tuple[int, ...]:
        return (1,) * steps

    def solve(self, velocity: Velocity, latents: Tensor, sigmas: Tensor) -> Tensor:
        before: Tensor | None = None
        signal = (1 - sigmas.double()).log() - sigmas.double().log()  # infinite at 0 and 1, where it is not used
        for place, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
            clean = latents - sigma * velocity(latents, sigma)
            guess = clean
            if before is not None and place < len(sigmas) - 2 and bool(torch.isfinite(signal[place - 1])):
                ratio = (signal[place] - signal[place - 1]) / (signal[place + 1] - signal[place])
                guess = clean + (clean - before) / (2 * ratio.to(clean.dtype))
            kept = following / sigma
            latents, before = kept * latents + (1 - following - (1 - sigma) * kept) * guess, clean
        return latents
