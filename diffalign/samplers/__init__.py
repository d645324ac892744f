"""Trajectory samplers and their plans."""

from .chain import ChainSampler
from .deterministic import DeterministicSampler
from .frontier import roll_out
from .plans import Branching, FixedPlan, Plan
from .tree import TreeSampler

__all__ = ["Branching", "ChainSampler", "DeterministicSampler", "FixedPlan", "Plan", "TreeSampler", "roll_out"]
