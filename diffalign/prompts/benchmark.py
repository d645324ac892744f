"""The 553 prompts of the GenEval benchmark, drawn by the benchmark's own published rule."""

import functools
import hashlib
from collections.abc import Iterator

import numpy as np

from diffalign.core import ConfigError, Prompt
from diffalign.vocabulary import COLORS, NAMES, POSITIONS

from .objects import attributed, colored, counted, pair, positioned, single

SEED = 43
DRAWN = 100
"""Number of draws of each kind but the first, before repeated prompts are left out."""

DIGEST = "4de60dfc3c29f9d3db69ec45cf03a964627c2d82f2c224c3f75645e137f7126b"
"""SHA-256 of the texts, one a line. numpy may draw other numbers one day; then this says so."""


@functools.cache
def geneval() -> tuple[Prompt, ...]:
    """The benchmark's prompts with their metadata, in its order: 80 single objects, 99 pairs, 80 counts, 94 colours, 100 positions, 100
    pairs of coloured objects. What its file `evaluation_metadata.jsonl` holds.

    Raises:
        ConfigError: the numbers that numpy draws have changed.

    Reference: Ghosh et al., arXiv:2310.11513, the rule and the seed as its repository gives them.
    """
    prompts = tuple({str(prompt): prompt for prompt in _drawn(np.random.default_rng(SEED))}.values())
    if digest(prompts) != DIGEST:
        raise ConfigError(
            f"generated/geneval: numpy {np.__version__} draws other numbers than the version that the benchmark's list was made with. "
            "Give its file evaluation_metadata.jsonl in place of this name."
        )
    return prompts


def digest(prompts: tuple[Prompt, ...]) -> str:
    """SHA-256 of the texts, one a line."""
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()


def _drawn(numbers: np.random.Generator) -> Iterator[Prompt]:
    """Draw the prompts. The benchmark's list depends on the order of the calls."""
    things, paintable = len(NAMES), len(NAMES) - 1  # nobody asks for a person of a colour: the first class is left out
    yield from (single(NAMES[place]) for place in numbers.choice(things, size=things, replace=False))
    for _ in range(DRAWN):
        first, second = numbers.choice(things, size=2, replace=False)
        yield pair(NAMES[first], NAMES[second])
    for _ in range(DRAWN):
        place = numbers.choice(things)
        yield counted(NAMES[place], int(numbers.integers(2, 4, endpoint=True)))
    for _ in range(DRAWN):
        place = numbers.choice(paintable) + 1
        yield colored(NAMES[place], COLORS[numbers.choice(len(COLORS))])
    for _ in range(DRAWN):
        first, second = numbers.choice(things, size=2, replace=False)
        yield positioned(NAMES[first], POSITIONS[numbers.choice(len(POSITIONS))], NAMES[second])
    for _ in range(DRAWN):
        first, second = numbers.choice(paintable, size=2, replace=False) + 1
        color, other = numbers.choice(len(COLORS), size=2, replace=False)
        yield attributed(NAMES[first], COLORS[color], NAMES[second], COLORS[other])
