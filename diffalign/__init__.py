"""Aligns flow-matching and diffusion image models with rewards, without collapsing them.

What a first program needs is here; the rest is in `diffalign.core`, `.policies`, `.samplers`, `.objectives`, `.rewards`, ...
"""

import importlib
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .core import AlignmentLoop, Hook, Prompt, Raw, ShiftedGrid, StandardizedSum
    from .objectives import SoftmaxTB
    from .policies import FlowMatchingPolicy, LoRA
    from .prompts import PromptFile
    from .samplers import FixedPlan, TreeSampler

__version__ = "0.1.0"

__all__ = [
    "AlignmentLoop",
    "FixedPlan",
    "FlowMatchingPolicy",
    "Hook",
    "LoRA",
    "Prompt",
    "PromptFile",
    "Raw",
    "ShiftedGrid",
    "SoftmaxTB",
    "StandardizedSum",
    "TreeSampler",
]

_ROOMS = {
    "AlignmentLoop": "core",
    "FixedPlan": "samplers",
    "FlowMatchingPolicy": "policies",
    "Hook": "core",
    "LoRA": "policies",
    "Prompt": "core",
    "PromptFile": "prompts",
    "Raw": "core",
    "ShiftedGrid": "core",
    "SoftmaxTB": "objectives",
    "StandardizedSum": "core",
    "TreeSampler": "samplers",
}

_LEFT_FOR_CORE = (
    *("Condition", "Gaussian", "Loss", "Objective", "Phase", "Policy", "Progress", "Reward", "ScoredBatch", "Streams"),
    *("TrajectoryBatch", "TrajectorySampler"),
)


def __getattr__(name: str) -> object:
    """The public names, imported when one is used: `diffalign --help` should not wait for torch."""
    if name not in _ROOMS and name not in _LEFT_FOR_CORE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _LEFT_FOR_CORE:
        warnings.warn(
            f"diffalign.{name} will go: write `from diffalign.core import {name}`",
            DeprecationWarning,
            stacklevel=2,
        )
    return getattr(importlib.import_module(f".{_ROOMS.get(name, 'core')}", __name__), name)
