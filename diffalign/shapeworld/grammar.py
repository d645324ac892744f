"""Language of ShapeWorld: scenes, the captions that describe them, and the prompt lists.

A caption and a `Scene` determine each other (`Scene.caption`, `parse`), so a scorer needs nothing but the text of the prompt.
"""

import itertools
import random
import re
from collections.abc import Iterator, Mapping

import attrs

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.12, 0.12),
    "green": (0.10, 0.65, 0.20),
    "blue": (0.12, 0.30, 0.92),
    "yellow": (0.95, 0.82, 0.08),
    "purple": (0.60, 0.15, 0.78),
}
SHAPES = ("circle", "square", "triangle", "cross")
NUMBERS = ("one", "two", "three", "four", "five", "six")
RELATIONS = ("left of", "right of", "above", "below")
ALPHABET = "ACEHKLNPTX47"
"""Characters of text prompts, chosen so that none looks like another."""
FAMILIES = ("count", "binding", "relation", "text")


@attrs.frozen
class Item:
    """One coloured shape."""

    color: str = attrs.field(validator=attrs.validators.in_(COLORS))
    shape: str = attrs.field(validator=attrs.validators.in_(SHAPES))

    def __str__(self) -> str:
        return f"{self.color} {self.shape}"


def _require_different(first: Item, second: Item) -> None:
    if first.color == second.color or first.shape == second.shape:
        raise ValueError(f"the two items must differ in colour and shape; got a {first} and a {second}")


@attrs.frozen
class Count:
    """Scene of `number` equal items and nothing else: "three red circles"."""

    item: Item
    number: int = attrs.field(validator=[attrs.validators.ge(1), attrs.validators.le(len(NUMBERS))])
    family = "count"

    @property
    def caption(self) -> str:
        plural = "" if self.number == 1 else "es" if self.item.shape.endswith("s") else "s"
        return f"{NUMBERS[self.number - 1]} {self.item}{plural}"

    @property
    def items(self) -> tuple[Item, ...]:
        return (self.item,) * self.number


@attrs.frozen
class Binding:
    """Scene of two items that differ in colour and shape: "a red circle and a blue square"."""

    first: Item
    second: Item
    family = "binding"

    def __attrs_post_init__(self) -> None:
        _require_different(self.first, self.second)

    @property
    def caption(self) -> str:
        return f"a {self.first} and a {self.second}"

    @property
    def items(self) -> tuple[Item, ...]:
        return (self.first, self.second)


@attrs.frozen
class Relation:
    """Scene of two items, with the position of the first relative to the second: "a green triangle left of a yellow circle"."""

    first: Item
    relation: str = attrs.field(validator=attrs.validators.in_(RELATIONS))
    second: Item
    family = "relation"

    def __attrs_post_init__(self) -> None:
        _require_different(self.first, self.second)

    @property
    def caption(self) -> str:
        return f"a {self.first} {self.relation} a {self.second}"

    @property
    def items(self) -> tuple[Item, ...]:
        return (self.first, self.second)


@attrs.frozen
class Text:
    """Scene of two characters in one colour: 'the text "K7" in blue'."""

    text: str = attrs.field(validator=attrs.validators.matches_re(f"[{ALPHABET}]{{2}}"))
    color: str = attrs.field(validator=attrs.validators.in_(COLORS))
    family = "text"

    @property
    def caption(self) -> str:
        return f'the text "{self.text}" in {self.color}'


Scene = Count | Binding | Relation | Text

_ITEM = rf"({'|'.join(COLORS)}) ({'|'.join(SHAPES)})"
_COUNT = re.compile(rf"({'|'.join(NUMBERS)}) {_ITEM}(?:e?s)?")
_BINDING = re.compile(rf"a {_ITEM} and a {_ITEM}")
_RELATION = re.compile(rf"a {_ITEM} ({'|'.join(RELATIONS)}) a {_ITEM}")
_TEXT = re.compile(rf'the text "([{ALPHABET}]{{2}})" in ({"|".join(COLORS)})')


def parse(caption: str) -> Scene:
    """Parse a caption into the scene that it describes.

    Raises:
        ValueError: the text is not a ShapeWorld caption; the message shows one of each family.
    """
    scene = _read(caption)
    if scene is not None and scene.caption == caption:  # the patterns also match "one red circles"
        return scene
    raise ValueError(
        f"{caption!r} is not a ShapeWorld caption. Captions read like 'three red circles', 'a red circle and a blue square', "
        "'a green triangle left of a yellow circle' or 'the text \"K7\" in blue'."
    )


def _read(caption: str) -> Scene | None:
    if match := _COUNT.fullmatch(caption):
        number, color, shape = match.groups()
        return Count(Item(color, shape), NUMBERS.index(number) + 1)
    if match := _BINDING.fullmatch(caption):
        one, one_shape, two, two_shape = match.groups()
        return Binding(Item(one, one_shape), Item(two, two_shape))
    if match := _RELATION.fullmatch(caption):
        one, one_shape, relation, two, two_shape = match.groups()
        return Relation(Item(one, one_shape), relation, Item(two, two_shape))
    if match := _TEXT.fullmatch(caption):
        return Text(*match.groups())
    return None


def scenes(family: str) -> list[Scene]:
    """List every scene of a family, in a fixed order."""
    items = [Item(color, shape) for color in COLORS for shape in SHAPES]
    pairs = [(a, b) for a in items for b in items if a.color != b.color and a.shape != b.shape]
    if family == "count":
        return [Count(item, number) for item in items for number in range(1, len(NUMBERS) + 1)]
    if family == "binding":
        return [Binding(a, b) for a, b in pairs]
    if family == "relation":
        return [Relation(a, relation, b) for a, b in pairs for relation in RELATIONS]
    if family == "text":
        return [Text(a + b, color) for a, b in itertools.product(ALPHABET, repeat=2) for color in COLORS]
    raise ValueError(f"family must be one of {', '.join(FAMILIES)}; got {family!r}")


def prompt_split(family: str) -> tuple[list[str], list[str]]:
    """Split a family into training and held-out captions by a fixed shuffle: one in five is held out; at most 192 and 48 are kept.

    No held-out caption describes the same image as a training caption in other words.
    """
    captions = [scene.caption for scene in scenes(family)]
    random.Random(f"shapeworld {family}").shuffle(captions)
    held_out = captions[: min(48, len(captions) // 5)]
    seen = {_picture(parse(caption)) for caption in held_out}
    others = [caption for caption in captions if _picture(parse(caption)) not in seen]
    return others[:192], held_out


def _picture(scene: "Scene") -> object:
    """Key that is equal for captions of the same image: "a A and a B" and "a B and a A", "a A above a B" and "a B below a A"."""
    if isinstance(scene, Binding):
        return frozenset((scene.first, scene.second))
    if isinstance(scene, Relation) and scene.relation in ("right of", "below"):
        return Relation(scene.second, {"right of": "left of", "below": "above"}[scene.relation], scene.first)
    return scene


def random_scenes(seed: int, shares: Mapping[str, float] | None = None) -> Iterator[Scene]:
    """Yield random scenes without end, with the four families in equal parts or by `shares` (family -> weight)."""
    generator = random.Random(seed)
    pools = {family: scenes(family) for family in FAMILIES}
    weights = None if shares is None else [shares[family] for family in FAMILIES]
    while True:
        yield generator.choice(pools[generator.choices(FAMILIES, weights)[0]])
