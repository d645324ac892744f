"""Noise added to states that are noisy already: the forward kernel between two sigmas, and the velocity of what it gives.

Legend: B rows, * latent dimensions; s is the sigma of a state, tau >= s the sigma that it is taken to; both [B].
"""

import torch
from torch import Tensor

from diffalign.core.transition import expand


def kernel(s: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """q(x_tau | x_s) = N(a x_s, b^2 I) with a = (1 - tau) / (1 - s), b^2 = tau^2 - a^2 s^2: a and b, each [B] (equation K).

    Kernels compose; s = 0 gives (1 - tau, tau), and tau = s gives (1, 0).

    Raises:
        ValueError: a tau below its s, or an s of 1, from which nothing can be added.
    """
    if bool(((tau < s) | (s >= 1)).any()):
        raise ValueError(f"noise can be added only upwards from s < 1: s must be at most tau; got s {s.tolist()} and tau {tau.tolist()}")
    wide_s, wide_tau = s.double(), tau.double()
    a = (1 - wide_tau) / (1 - wide_s)
    b = (wide_tau.square() - (a * wide_s).square()).clamp(min=0).sqrt()
    return a.to(s.dtype), b.to(s.dtype)


def diffuse(state: Tensor, s: Tensor, tau: Tensor, noise: Tensor) -> Tensor:
    """x_tau = a x_s + b e for unit noise e: [B, *]."""
    a, b = kernel(s, tau)
    return expand(a, state) * state + expand(b, state) * noise


def bridge(state: Tensor, s: Tensor, tau: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """x_tau = a x_s + b e and its derivative by tau, -x_s / (1 - s) + (e / b) (tau + s^2 a / (1 - s)): [B, *] each (equation T).

    The mean of the derivative given x_tau is -x_tau / (1 - tau) - tau / (1 - tau) score(x_tau), the exact velocity of the diffused law of
    the states, whatever that law is. At s = 0 it is e - x_0. Its variance diverges as tau falls to s, so keep a margin.

    Raises:
        ValueError: tau = s, where the derivative is infinite.
    """
    a, b = kernel(s, tau)
    if bool((b <= 0).any()):
        raise ValueError(f"the velocity of added noise needs tau above s; got tau {tau.tolist()} and s {s.tolist()}")
    velocity = -state / expand(1 - s, state) + expand((tau + s.square() * a / (1 - s)) / b, state) * noise
    return expand(a, state) * state + expand(b, state) * noise, velocity


def bridge_velocity(state: Tensor, s: Tensor, tau: Tensor, noise: Tensor) -> Tensor:
    """The derivative of `bridge` alone: [B, *]."""
    return bridge(state, s, tau, noise)[1]


def mean_over_dimensions(values: Tensor) -> Tensor:
    """[B, *] -> [B], at least in float32."""
    return values.flatten(1).to(torch.promote_types(values.dtype, torch.float32)).mean(dim=1)
