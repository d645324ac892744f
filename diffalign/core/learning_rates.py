"""Learning rates that change over a run."""

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer

from .schedule import Foreseen, Scalar, scalar
from .types import Progress

WEIGHT_DECAY = 1e-4
"""Weight decay of AdamW where none is given: that of the published runs. Torch's own default, 0.01, is for training from the start."""


def adamw(parameters: list[nn.Parameter], lr: float = 1e-4) -> torch.optim.Optimizer:
    """Default optimizer, and the one that a bare learning rate means: AdamW, weight decay 1e-4."""
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=WEIGHT_DECAY)


def require_factors(factor: Scalar | float, total: int) -> None:
    """Refuse a factor that is known before the run and is negative or not finite at a step; of a long run some thousand are looked at.

    Args:
        factor: factor on all learning rates
        total: steps of the run

    Raises:
        ValueError: names such a step.
    """
    known = scalar(factor)
    if isinstance(known, Foreseen):
        for step in sorted({*range(0, total, max(1, total // 1000)), total - 1}):
            _require_factor(known(Progress(step, total)), step)


def _require_factor(now: float, step: int) -> None:
    if not 0 <= now < math.inf:
        raise ValueError(f"lr_factor must be finite and at least 0; at step {step} it is {now:g}. No weight was updated.")


def scale_learning_rates(optimizers: Iterable[Optimizer], factor: Scalar | float, progress: Progress) -> float:
    """Set every learning rate to its initial value times `factor` at this step.

    Returns:
        The factor of this step.

    Raises:
        ValueError: the factor is negative or not finite.
    """
    now = scalar(factor)(progress)
    _require_factor(now, progress.step)
    for optimizer in optimizers:
        for group in optimizer.param_groups:  # a checkpoint keeps "lr" and the initial one, so that a resumed run does not multiply twice
            if now != 1 or "initial_lr" in group:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * now
    return now
