"""Trajectory samplers and their plans."""

from .adaptive_plan import AdaptivePlan
from .chain import ChainSampler
from .deterministic import DeterministicSampler
from .drawn_steps import DrawnSteps
from .fixed_plan import FixedPlan
from .frontier import roll_out
from .plans import Branches, Branching, Plan
from .progress_plan import ProgressPlan
from .tree import TreeSampler
from .window_plans import RandomWindow, SlidingWindow

__all__ = [
    "AdaptivePlan",
    "Branches",
    "Branching",
    "ChainSampler",
    "DeterministicSampler",
    "DrawnSteps",
    "FixedPlan",
    "Plan",
    "ProgressPlan",
    "RandomWindow",
    "SlidingWindow",
    "TreeSampler",
    "roll_out",
]
