"""Prompts about objects to train on, none of them of the GenEval benchmark."""

import functools
import random
from collections.abc import Collection, Mapping
from typing import ClassVar

from diffalign.core import Prompt
from diffalign.vocabulary import COLORS, NAMES, POSITIONS

from .benchmark import geneval
from .grammar import Grammar
from .objects import NUMBERS, attributed, colored, content, counted, pair, positioned


class CompositionGrammar(Grammar):
    """Positions, counts, colours and pairs of the 80 classes of COCO, in GenEval's words and with its metadata.

    What one of the benchmark's 553 prompts asks for comes in no list, in whatever order.

    Single objects are all in the benchmark, so there are none.

    Reference: the mix of Liu et al., Flow-GRPO, arXiv:2505.05470.
    """

    mix: ClassVar[Mapping[str, int]] = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}

    def draw(self, kind: str, chance: random.Random) -> Prompt:
        if kind == "counting":
            return counted(chance.choice(NAMES), chance.randrange(2, 2 + len(NUMBERS)))
        if kind == "colors":
            return colored(chance.choice(NAMES[1:]), chance.choice(COLORS))
        if kind == "color_attr":
            (first, second), (color, other) = chance.sample(NAMES[1:], 2), chance.sample(COLORS, 2)
            return attributed(first, color, second, other)
        first, second = chance.sample(NAMES, 2)
        return pair(first, second) if kind == "two_object" else positioned(first, chance.choice(POSITIONS), second)

    def content(self, prompt: Prompt) -> str:
        return content(prompt)

    def reserved(self) -> Collection[str]:
        return _benchmark()


@functools.cache
def _benchmark() -> frozenset[str]:
    return frozenset(map(content, geneval()))
