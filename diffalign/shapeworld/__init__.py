"""ShapeWorld: the embedded default. Captioned pictures of shapes and letters, a pipeline trained on them, scorers and prompt lists."""

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
