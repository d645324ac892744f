"""Lists of prompts that need no file, by name."""

from collections.abc import Mapping

import attrs

from diffalign.core import ConfigError, Prompt

from .benchmark import geneval
from .composition import CompositionGrammar
from .grammar import Grammar
from .scenes import SceneGrammar
from .writing import WritingGrammar

PREFIX = "generated"
"""`generated/NAME` is a path of a prompt source."""

BENCHMARK = "geneval"
"""The name of the list that is the benchmark itself."""


@attrs.frozen
class GeneratedList:
    """List that a name stands for.

    Args:
        grammar: draws the prompts
        count: number of prompts by default
        held_out: take the contents that are never trained on
    """

    grammar: Grammar
    count: int
    held_out: bool = False


LISTS: Mapping[str, GeneratedList] = {
    name + ending: GeneratedList(grammar, count, bool(ending))
    for name, grammar, many in (
        ("composition", CompositionGrammar(), 256),
        ("text", WritingGrammar(), 256),
        ("preference", SceneGrammar(), 200),
    )
    for ending, count in (("", 10_000), ("-held-out", many))
}
NAMES = (*LISTS, BENCHMARK)
"""All of them."""


def generated(name: str, count: int | None = None, seed: int = 0) -> list[Prompt]:
    """The prompts of a list, the same for equal arguments.

    Args:
        name: composition, text or preference, each also with -held-out; or geneval, the benchmark's own 553
        count: number of prompts; None is the list's own number
        seed: seed of the draws

    Raises:
        ConfigError: no such list, or a choice that it does not have.
    """
    if name == BENCHMARK:
        if count is not None or seed:
            raise ConfigError("geneval is the benchmark's fixed list: leave out count and seed")
        return list(geneval())
    if name not in LISTS:
        raise ConfigError(f"there is no list {PREFIX}/{name}; known: {', '.join(NAMES)}")
    chosen = LISTS[name]
    return chosen.grammar.prompts(chosen.count if count is None else count, seed, chosen.held_out)
