"""Language of the digits: the meaning of a prompt, and the prompt lists.

A caption and a `Wish` determine each other (`Wish.caption`, `parse`), so a reward needs nothing but the text of the prompt.
"""

import functools
import random
from collections.abc import Iterator, Mapping
from typing import Literal

import attrs

from ..core.words import allowed_word
from .classes import CLASSES, classes_of

Thickness = Literal["thin", "thick"]
STROKES: tuple[Thickness, ...] = ("thin", "thick")
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SETS: Mapping[str, tuple[int, ...]] = {
    "even digit": (0, 2, 4, 6, 8),
    "odd digit": (1, 3, 5, 7, 9),
    "digit above five": (6, 7, 8, 9),
    "digit below five": (0, 1, 2, 3, 4),
}
NOUNS: Mapping[str, tuple[int, ...]] = {"digit": CLASSES, **SETS, **{name: (digit,) for digit, name in enumerate(NAMES)}}
"""Nouns of prompts, with the digits that fulfil each."""

FAMILIES = ("any", "set", "name")
"""Kinds of prompts: "a digit", "an even digit", "a seven", each also thin or thick."""


@attrs.frozen
class Wish:
    """Wish of a prompt.

    Args:
        classes: the digits that fulfil it, in order; those of one of `NOUNS`, or none for the empty prompt
        thickness: thickness of the stroke; None means any

    Raises:
        ValueError: no prompt can name the digits, the thickness is unknown, or there is a thickness without digits.
    """

    classes: tuple[int, ...] = attrs.field(converter=classes_of)
    thickness: Thickness | None = attrs.field(default=None, validator=allowed_word)

    def __attrs_post_init__(self) -> None:
        if self.classes not in (*NOUNS.values(), ()) or (not self.classes and self.thickness):
            nouns = ", ".join(NOUNS)
            raise ValueError(f"Wish.classes must be the digits of one of: {nouns}; or none, of any thickness; got {self}")

    @property
    def noun(self) -> str:
        """Key in `NOUNS`; "" for the empty prompt."""
        return next((noun for noun, classes in NOUNS.items() if classes == self.classes), "")

    @property
    def family(self) -> str:
        """Family of the prompt, one of `FAMILIES`; "" for the empty prompt."""
        if len(self.classes) < 2:
            return "name" if self.classes else ""
        return "any" if self.classes == CLASSES else "set"

    @property
    def caption(self) -> str:
        """Text of the prompt, such as "a thin seven"."""
        words = " ".join(filter(None, (self.thickness, self.noun)))
        return words and f"{'an' if words.startswith(('even', 'odd', 'eight')) else 'a'} {words}"

    def __str__(self) -> str:
        return f"{list(self.classes)}, {self.thickness or 'any'} stroke"


NOTHING = Wish(())
"""Wish of the empty prompt, which guidance leads away from."""


def parse(text: str) -> Wish:
    """Parse a prompt into its wish; the empty text asks for nothing.

    Raises:
        ValueError: the text is none of the 45 prompts; the message describes them.
    """
    wish = _known().get(text)
    if wish is None:
        raise ValueError(
            f"{text!r} is no prompt of digits. They read 'a digit', 'an even digit', 'an odd digit', 'a digit above five', 'a digit below "
            f"five', or name one digit, as 'a seven' ({', '.join(NAMES)}); each may be thin or thick, as 'a thin seven'. The empty text "
            "asks for nothing."
        )
    return wish


@functools.cache
def _known() -> Mapping[str, Wish]:
    return {"": NOTHING, **{wish.caption: wish for family in FAMILIES for wish in wishes(family)}}


def wishes(family: str) -> list[Wish]:
    """List every wish of a family, in a fixed order.

    Raises:
        ValueError: there is no such family.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}; got {family!r}")
    return [wish for wish in _all() if wish.family == family]


def _all() -> Iterator[Wish]:
    for classes in NOUNS.values():
        for thickness in (None, *STROKES):
            yield Wish(classes, thickness)


def prompt_split(family: str) -> tuple[list[str], list[str]]:
    """Split a family into training and held-out prompts, by a fixed shuffle: one in five (at least one) is held out, never "a digit"."""
    captions = [wish.caption for wish in wishes(family)]
    random.Random(f"digits {family}").shuffle(captions)
    captions.sort(key=lambda caption: caption == "a digit")  # last
    count = max(1, len(captions) // 5)
    return captions[count:], captions[:count]
