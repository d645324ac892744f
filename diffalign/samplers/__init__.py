"""Trajectory samplers and their plans."""

from .adaptive_plan import AdaptivePlan
from .chain import ChainSampler
from .deterministic import DeterministicSampler
from .drawn_steps import DrawnSteps
from .fixed_plan import FixedPlan
from .frontier import foreseen, roll_out
from .plans import Branches, Branching, Plan
from .progress_plan import ProgressPlan
from .solvers import AdamsBashforth, DPMSolver, Heun, Midpoint, Solver
from .tree import TreeSampler
from .window_plans import RandomWindow, SlidingWindow

# For users, who compose a run, run it and look at it.
__all__ = [
    "AdamsBashforth",
    "AdaptivePlan",
    "ChainSampler",
    "DPMSolver",
    "DeterministicSampler",
    "DrawnSteps",
    "FixedPlan",
    "Heun",
    "Midpoint",
    "ProgressPlan",
    "RandomWindow",
    "SlidingWindow",
    "TreeSampler",
]

# For authors, who write a sampler or a plan.
__all__ += ["Branches", "Branching", "Plan", "Solver", "foreseen", "roll_out"]
