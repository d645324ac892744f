"""Scales of a loss: factors that keep gradients from becoming zero where they pass through float16."""

from collections.abc import Mapping

import torch

from .policy import Policy

_SCALES = (2.0**16, 2.0**12, 2.0**8, 2.0**4)
"""Scales that are tried in this order: powers of two, which round nothing. Each update begins with the first, so resume needs no state."""


def scales_of(trains: Mapping[str, Policy]) -> tuple[float, ...]:
    """List the scales of a phase's losses, largest first: 2^16, 2^12, ..., 1. The first that gives finite gradients is taken.

    The smallest number of float16 is 6e-8. The gradient of a velocity is often smaller, because a loss is a mean over many numbers of many
    samples. The gradients of the scaled loss are divided by its scale in the trained weights, which must be of a wider type.

    Args:
        trains: role -> weights that the phase trains

    Returns:
        1 alone, if no trained policy computes in float16, or if some of the trained weights are float16 themselves.
    """
    halves = any(policy.precision == torch.float16 for policy in trains.values())
    wide = all(parameter.dtype != torch.float16 for policy in trains.values() for parameter in policy.trainable_parameters().values())
    return (*_SCALES, 1.0) if halves and wide else (1.0,)


@torch.no_grad()
def unscale(trains: Mapping[str, Policy], scale: float) -> None:
    """Divide the gradients of trained weights by the scale of their losses, in place."""
    if scale == 1.0:
        return
    gradients = {id(p): p.grad for policy in trains.values() for p in policy.trainable_parameters().values() if p.grad is not None}
    for gradient in gradients.values():  # each once, also where two roles share weights
        gradient.div_(scale)
