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

# For users, who compose a run, run it and look at it.
__all__ = ["AdaptivePlan", "ChainSampler", "DeterministicSampler", "DrawnSteps", "FixedPlan", "ProgressPlan", "TreeSampler"]

# For authors, who write a sampler or a plan.
__all__ += ["Branches", "Branching", "Plan", "roll_out"]
