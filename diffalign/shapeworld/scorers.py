"""Rewards for ShapeWorld: they compare an image with its caption, from pixels only, deterministic, on the CPU."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..core import Prompt, Reward
from .grammar import FAMILIES, Binding, Count, Item, Relation, Scene, Text, parse, scenes
from .recognition import Found, Reading, check_images, find_objects, read_text

CLEAR = 0.7
"""Least `Found.quality` of an object with a shape; below it (a letter reaches 0.65) the object has no shape."""

Score = Callable[[Scene, list[Found], Reading | None], float]


class CountReward(Reward):
    """Counting reward: checks that the image shows the asked number of items and nothing else, as in "three red circles".

        reward = min(m, n) / max(t, n)

    with n the asked number, m the number of objects of the right colour and shape, t the number of all objects. An empty image gives 0.

    Raises:
        ValueError: the caption is of another family; images that are not [K, 3, 64, 64] floating point numbers in [0, 1].
    """

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return _scored("CountReward", ("count",), _partial, images, prompts)


class BindingReward(Reward):
    """Binding reward: checks that each of two shapes has its own colour, as in "a red circle and a blue square".

        reward = (number of the two items that are found) / max(2, t)

    with t the number of all objects. Exchanged colours give 0, one right item gives 1/2.

    Raises:
        ValueError: the caption is of another family; images that are not [K, 3, 64, 64] floating point numbers in [0, 1].
    """

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return _scored("BindingReward", ("binding",), _partial, images, prompts)


class RelationReward(Reward):
    """Relation reward: checks both items and their positions, as in "a green triangle left of a yellow circle".

        reward = (number of the two items that are found / 4 + (1/2 if the relation holds)) * 2 / max(2, t)

    with t the number of all objects. "a left of b" holds if the middle of a is left of that of b by more than it is above or below it.
    With several candidates, one pair is enough. The relation needs both items.

    Raises:
        ValueError: the caption is of another family; images that are not [K, 3, 64, 64] floating point numbers in [0, 1].
    """

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return _scored("RelationReward", ("relation",), _partial, images, prompts)


class TextReward(Reward):
    """Text reward: checks that the text can be read in its colour, as in 'the text "K7" in blue'.

        reward = (s_1 + s_2) / 2 * (1 + c) / 2,    s_i = clip((f_i - 0.3) / 0.5, 0, 1), halved if another character fits better

    with f_i the fit of the i-th character at its place (see `Reading`) and c the share of the ink in the right colour. All ink of the
    image counts as text.

    Raises:
        ValueError: the caption is of another family; images that are not [K, 3, 64, 64] floating point numbers in [0, 1].
    """

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return _scored("TextReward", ("text",), _partial, images, prompts)


class CompositionalReward(Reward):
    """Reward by the family of each caption: `CountReward`, `BindingReward`, `RelationReward` or `TextReward`.

    Raises:
        ValueError: no ShapeWorld caption; images that are not [K, 3, 64, 64] floating point numbers in [0, 1].
    """

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return _scored("CompositionalReward", FAMILIES, _partial, images, prompts)


class ExactMatch(Reward):
    """Accuracy: 1 if the image shows exactly what its caption says and nothing else, else 0; for captions of all families.

    For items: the number of each is right, there is no other object, and the relation holds. For text: both characters fit best, by at
    least 0.7, and nine tenths of the ink have the right colour.

    Raises:
        ValueError: no ShapeWorld caption; images that are not [K, 3, 64, 64] floating point numbers in [0, 1].
    """

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return _scored("ExactMatch", FAMILIES, _exact, images, prompts)


def _scored(name: str, families: Sequence[str], score: Score, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    device, images = images.device, images.detach().cpu()  # one copy, because everything below reads pixels on the host
    check_images(images)
    if len(images) != len(prompts):
        raise ValueError(f"{name} needs one prompt per image; got {len(images)} images and {len(prompts)} prompts.")
    wanted = [parse(prompt) for prompt in prompts]
    for i, scene in enumerate(wanted):
        if scene.family not in families:
            raise ValueError(
                f"{name} scores {families[0]} captions such as {scenes(families[0])[0].caption!r}; prompts[{i}] is of the family "
                f"{scene.family}: {scene.caption!r}. Use CompositionalReward for mixed prompts."
            )
    found: list[list[Found]] = [[] for _ in wanted]
    readings: list[Reading | None] = [None for _ in wanted]
    written = torch.tensor([isinstance(scene, Text) for scene in wanted], dtype=torch.bool)
    for i, objects in zip((~written).nonzero().flatten().tolist(), find_objects(images[~written]), strict=True):
        found[i] = objects
    for i, reading in zip(written.nonzero().flatten().tolist(), read_text(images[written]), strict=True):
        readings[i] = reading
    scores = [score(*sight) for sight in zip(wanted, found, readings, strict=True)]
    return torch.tensor(scores, dtype=torch.float32, device=device)


def _partial(scene: Scene, found: list[Found], reading: Reading | None) -> float:
    if isinstance(scene, Text):
        return 0.0 if reading is None else _legible(scene, reading) * (1 + reading.colors[scene.color]) / 2
    number = len(scene.items)
    share = _matched(scene, found) / max(number, len(found))
    if isinstance(scene, Relation):
        return share / 2 + _related(scene, found) / max(number, len(found))
    return share


def _exact(scene: Scene, found: list[Found], reading: Reading | None) -> float:
    if isinstance(scene, Text):
        if reading is None or reading.text != scene.text or reading.colors[scene.color] < 0.9:
            return 0.0
        return float(all(fits[character] >= CLEAR for fits, character in zip(reading.fits, scene.text, strict=True)))
    complete = _matched(scene, found) == len(found) == len(scene.items)
    return float(complete and (not isinstance(scene, Relation) or _related(scene, found)))


def _candidates(item: Item, found: list[Found]) -> list[Found]:
    return [thing for thing in found if (thing.color, thing.shape) == (item.color, item.shape) and thing.quality >= CLEAR]


def _matched(scene: Count | Binding | Relation, found: list[Found]) -> int:
    """Number of asked items that were found, counting each object once."""
    return sum(min(scene.items.count(item), len(_candidates(item, found))) for item in set(scene.items))


def _related(scene: Relation, found: list[Found]) -> bool:
    return any(_holds(scene.relation, a, b) for a in _candidates(scene.first, found) for b in _candidates(scene.second, found))


def _holds(relation: str, a: Found, b: Found) -> bool:
    right, down = a.x - b.x, a.y - b.y
    along, across = {"left of": (-right, down), "right of": (right, down), "above": (-down, right), "below": (down, right)}[relation]
    return along > abs(across)


def _legible(text: Text, reading: Reading) -> float:
    scores = [
        min(max((fits[character] - 0.3) / 0.5, 0), 1) * (1 if character == best else 0.5)
        for character, fits, best in zip(text.text, reading.fits, reading.text, strict=True)
    ]
    return sum(scores) / len(scores)
