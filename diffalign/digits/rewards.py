"""Rewards for digits: black boxes that see only pixels, deterministic, on any device."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import attrs
import torch
from torch import Tensor

from ..core import ConfigError, Prompt, Reward
from ..core.words import allowed_word
from .classes import CLASSES, classes_of
from .grammar import STROKES, Thickness, Wish, parse
from .handwriting import LEVELS
from .judge import Sight, look
from .thickness import is_of, rank, relative_ink


def _some(classes: Iterable[int]) -> tuple[int, ...]:
    found = classes_of(classes)
    if not found:
        raise ValueError("classes must name at least one digit; got none")
    return found


def _bonus(given: Mapping[int, float] | None) -> dict[int, float]:
    bonus = {digit: float(value) for digit, value in (given or {}).items()}
    classes_of(bonus)
    if odd := [value for value in bonus.values() if not abs(value) < float("inf")]:
        raise ValueError(f"bonus must hold finite numbers; got {odd[0]}")
    return bonus


@attrs.frozen
class DigitReward(Reward):
    """Prompt reward: 1 if the image shows the digit and the stroke of its prompt, else 0.

        reward = [sum_{k in wished} p_k > 0.5] [max_k p_k > 0.8] [the stroke is as wished]

    with p the judge's probabilities. A stroke is thin (thick) if its ink, relative to the median of real images of that digit, lies in
    the lower (upper) third of the real images.

    Raises:
        ValueError: a prompt cannot be read or asks for nothing, there are not as many prompts as images, or images are not [K, 3, H, W]
            floating point numbers in [0, 1].
    """

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        if len(images) != len(prompts):
            raise ValueError(f"DigitReward needs one prompt per image; got {len(images)} images and {len(prompts)} prompts")
        wishes = [_wish(prompt, place) for place, prompt in enumerate(prompts)]
        sight = look(images)
        wished = torch.zeros(len(wishes), len(CLASSES))
        for row, wish in enumerate(wishes):
            wished[row, list(wish.classes)] = 1
        right = sight.sure & ((sight.probabilities * wished).sum(dim=1) > 0.5)
        relative = relative_ink(sight.ink, sight.classes)
        for stroke in STROKES:
            right &= is_of(stroke, relative) | torch.tensor([wish.thickness != stroke for wish in wishes], dtype=torch.bool)
        return right.float().to(images.device)

    def require(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts that cannot be read, or that ask for nothing.

        Raises:
            ConfigError: names the first of them.
        """
        for place, prompt in enumerate(prompts):
            try:
                _wish(prompt, place)
            except ValueError as error:
                raise ConfigError(f"DigitReward cannot score the prompt {str(prompt)!r}: {error}") from error


def _wish(prompt: Prompt, place: int) -> Wish:
    wish = parse(prompt)
    if not wish.classes:
        raise ValueError(f"DigitReward needs prompts that ask for something; prompts[{place}] is empty. Give 'a digit' if any will do.")
    return wish


@attrs.frozen
class ClassReward(Reward):
    """Class reward: rewards some digits, whatever the prompt is, with a bonus for single digits. Its optimum is known (see `tilt`).

        reward = [k in classes] + bonus_k   for the digit k that the judge sees, if it is sure (max_k p_k > 0.8), else 0

    Args:
        classes: digits that are rewarded
        bonus: digit -> number that is added for it

    Raises:
        ValueError: `classes` is empty or holds others than 0 to 9, a bonus is not finite, or the images are wrong, as in `DigitReward`.
    """

    classes: Sequence[int] = attrs.field(default=(0, 2, 4, 6, 8), converter=_some)
    bonus: Mapping[int, float] | None = attrs.field(default=None, converter=_bonus)

    def values(self) -> Tensor:
        """Reward of each digit: float64 [10]."""
        return torch.tensor([float(k in self.classes) + (self.bonus or {}).get(k, 0.0) for k in CLASSES], dtype=torch.float64)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        sight = look(images)
        return (self.values().float()[sight.classes] * sight.sure).to(images.device)


@attrs.frozen
class ThicknessReward(Reward):
    """Thickness reward in [0, 1]: rewards a thin or a thick stroke, whatever the digit is.

        reward = F(ink) for "thick", 1 - F(ink) for "thin", and 0 if the judge is not sure of a digit

    with ink relative to the median of the real images of the digit, and F the share of the real images that have less.

    Args:
        target: "thin" or "thick"

    Raises:
        ValueError: the target is unknown, or the images are wrong, as in `DigitReward`.
    """

    target: Thickness = attrs.field(default="thick", validator=allowed_word)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        sight = look(images)
        share = rank(relative_ink(sight.ink, sight.classes))
        return ((share if self.target == "thick" else 1 - share) * sight.sure).to(images.device)


@attrs.frozen
class LikesReward(Reward):
    """Simulated feedback of a person: 1 for some digits and 0 for all else, with some wrong answers.

        reward = [k in classes, seen surely] xor [u < error],   u in [0, 1) from SHA-256(seed, the 64 fields in 17 levels)

    The same image always gets the same answer, right or wrong, so averaging over repeated answers does not remove the errors.

    Args:
        classes: digits that are liked
        error: share of wrong answers
        seed: decides which images get a wrong answer

    Raises:
        ValueError: `classes` is empty or holds others than 0 to 9, the error is outside [0, 1/2], or the images are wrong, as in
            `DigitReward`.
    """

    classes: Sequence[int] = attrs.field(default=(0, 2, 4, 6, 8), converter=_some)
    error: float = attrs.field(default=0.1, validator=[attrs.validators.ge(0.0), attrs.validators.le(0.5)])
    seed: int = 0

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        sight = look(images)
        liked = _liked(sight, self.classes)
        wrong = [share < self.error for share in _fates(sight.ink, self.seed)]
        return (liked ^ torch.tensor(wrong, dtype=torch.bool)).float().to(images.device)


def _liked(sight: Sight, classes: Sequence[int]) -> Tensor:
    return sight.sure & torch.isin(sight.classes, torch.tensor(classes))


def _fates(ink: Tensor, seed: int) -> list[float]:
    """Number in [0, 1) for each image, a hash of its pixels and the seed."""
    levels = (ink * LEVELS).round().to(torch.uint8).flatten(1).numpy()
    return [int.from_bytes(hashlib.sha256(f"likes {seed} ".encode() + row.tobytes()).digest()[:7]) / 2**56 for row in levels]
