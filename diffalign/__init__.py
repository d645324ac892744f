"""Aligns flow-matching and diffusion image models with rewards, without collapsing them."""

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
