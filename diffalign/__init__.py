"""Aligns flow-matching and diffusion image models with rewards, without collapsing them."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .core import (
        AlignmentLoop,
        Condition,
        Gaussian,
        Loss,
        Objective,
        Phase,
        Policy,
        Progress,
        Prompt,
        Reward,
        ScoredBatch,
        Streams,
        TrajectoryBatch,
        TrajectorySampler,
    )

__version__ = "0.1.0"

__all__ = [
    "AlignmentLoop",
    "Condition",
    "Gaussian",
    "Loss",
    "Objective",
    "Phase",
    "Policy",
    "Progress",
    "Prompt",
    "Reward",
    "ScoredBatch",
    "Streams",
    "TrajectoryBatch",
    "TrajectorySampler",
]


def __getattr__(name: str) -> object:
    """The public names, imported when one is used: `diffalign --help` should not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import core

    return getattr(core, name)
