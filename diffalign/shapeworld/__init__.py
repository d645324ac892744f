"""ShapeWorld, the default world of the package: captioned images of shapes and letters, a trained pipeline, scorers and prompt lists."""

from .grammar import COLORS, FAMILIES, SHAPES, parse, prompt_split
from .scorers import BindingReward, CompositionalReward, CountReward, ExactMatch, RelationReward, TextReward

__all__ = [
    "COLORS",
    "FAMILIES",
    "SHAPES",
    "BindingReward",
    "CompositionalReward",
    "CountReward",
    "ExactMatch",
    "RelationReward",
    "TextReward",
    "parse",
    "prompt_split",
]
