"""Prompts by rule, in two lists that share no content."""

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import ClassVar

from diffalign.core import ConfigError, Prompt

HELD_OUT = 4
"""One content in so many is never trained on."""

_PATIENCE = 2000
"""Draws of a kind without a new content, after which it has none left."""


class Grammar(ABC):
    """A rule that draws prompts with metadata.

    Attributes:
        mix: share of each kind of prompt
    """

    mix: ClassVar[Mapping[str, int]]

    @abstractmethod
    def draw(self, kind: str, chance: random.Random) -> Prompt:
        """Any prompt of a kind."""

    @abstractmethod
    def content(self, prompt: Prompt) -> str:
        """Content that it asks for. Prompts of one content are held out together."""

    def reserved(self) -> Collection[str]:
        """Contents that are in no list, because a benchmark asks for them."""
        return ()

    def prompts(self, count: int, seed: int = 0, held_out: bool = False) -> list[Prompt]:
        """A list, the same for equal arguments.

        A content is held out if its hash says so, whatever the seed and the count. Those to train on may come more than once; those that
        are held out come once, and a kind that has no more of them comes no more.

        Args:
            count: number of prompts
            seed: seed of the draws
            held_out: draw from the contents that are held out

        Raises:
            ConfigError: there are not so many contents to hold out.
        """
        chance = random.Random(f"{type(self).__name__} {seed} {held_out}")
        left, taken = dict(self.mix), set(self.reserved())
        drawn: list[Prompt] = []
        while len(drawn) < count:
            if not left:
                raise ConfigError(f"count must be at most about {len(drawn)}: there are no more contents to hold out; got {count}")
            kind = chance.choices(list(left), list(left.values()))[0]
            prompt = self._new(kind, chance, held_out, taken)
            if prompt is None:
                del left[kind]
                continue
            taken |= {self.content(prompt)} if held_out else set()
            drawn.append(prompt)
        return drawn

    def _new(self, kind: str, chance: random.Random, held_out: bool, taken: Collection[str]) -> Prompt | None:
        for _ in range(_PATIENCE):
            prompt = self.draw(kind, chance)
            content = self.content(prompt)
            if content not in taken and is_held_out(content) == held_out:
                return prompt
        return None


def is_held_out(content: str) -> bool:
    """Check whether prompts of this content are never trained on: one content in `HELD_OUT`, chosen by its hash."""
    return hashlib.sha256(content.encode()).digest()[0] % HELD_OUT == 0
