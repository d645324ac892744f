"""Calls of rewards; refuses a result that is not one finite number per image."""

import inspect
import sysconfig
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .errors import NonFiniteRewardError, RewardError
from .interfaces import RewardFunction
from .types import Prompt

_PACKAGE = str(Path(__file__).parents[1])
_LIBRARY = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib"))


def reward_name(reward: object) -> str:
    """The name of a function, or of the class of an object."""
    return getattr(reward, "__name__", type(reward).__name__)


def named_rewards(rewards: RewardFunction | Mapping[str, RewardFunction]) -> dict[str, RewardFunction]:
    """Rewards by name; a single reward gets its own name."""
    named = dict(rewards) if isinstance(rewards, Mapping) else {reward_name(rewards): rewards}
    if not named:
        raise ValueError("rewards must name at least one reward; got none")
    for name, reward in named.items():
        if not callable(reward):
            raise ValueError(f"rewards[{name!r}] must be callable with (images, prompts); got {type(reward).__name__}")
        require_order(name, reward)
    return named


_IMAGES = frozenset(("image", "images", "pictures", "pixels", "imgs"))
_PROMPTS = frozenset(("prompt", "prompts", "texts", "captions"))


def require_order(name: str, reward: RewardFunction) -> None:
    """Refuse a reward whose parameters are in the order (prompts, images).

    Raises:
        ValueError: it does.
    """
    try:
        first, second, *_ = inspect.signature(reward).parameters
    except (TypeError, ValueError):  # written in C, or it takes *arguments: its call will tell
        return
    if first in _PROMPTS and second in _IMAGES:
        raise ValueError(f"rewards[{name!r}] must take (images, prompts), in this order; it takes ({first}, {second}). Exchange them.")


@torch.no_grad()
def score(rewards: Mapping[str, RewardFunction], images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """Score images: raw scores by reward name, each [K], float32, on the device of the images.

    Raises:
        RewardError: a reward raised, changed the images, or returned another shape, or a number that is not finite.
    """
    return {name: _checked(name, reward, images, prompts) for name, reward in rewards.items()}


def _fingerprint(images: Tensor) -> tuple[int, int]:
    """Changes with the images: how often torch has written into them, and, on the host, the sum of their bits, for what numpy writes.

    A sum of whole numbers has no rounding, and is the same in any order. Of a device nothing else writes, and nothing is waited for.
    """
    version = 0 if images.is_inference() else images._version
    if images.device.type != "cpu":
        return version, 0
    bits = images.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[images.element_size()])
    return version, int(bits.sum(dtype=torch.int64))


def _place(error: BaseException) -> str:
    """' (file, line)' of the last frame outside the package and its libraries: the line that a user wrote. Nothing where there is none."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


def _is_users(file: str) -> bool:
    return not ({"site-packages", "dist-packages"} & set(Path(file).parts)) and not file.startswith((_PACKAGE, *_LIBRARY, "<frozen"))


def _checked(name: str, reward: RewardFunction, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    before = _fingerprint(images)
    try:
        result = reward(images, prompts)
    except torch.OutOfMemoryError:  # not a fault of the reward: fewer images at once may fit
        raise
    except Exception as error:
        place = _place(error)
        raise RewardError(f"reward {name!r} raised {type(error).__name__} for {len(images)} images: {error}{place}") from error
    if _fingerprint(images) != before:
        raise RewardError(
            f"reward {name!r} must not change the images that it is given: other rewards and the record see the same ones. Let it work on "
            "a copy, images.clone()."
        )
    try:
        scores = torch.as_tensor(result, dtype=torch.float32).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise RewardError(f"reward {name!r} must return numbers, shape ({len(images)},); got {type(result).__name__}: {error}") from error
    if scores.shape != (len(images),):
        raise RewardError(
            f"{name} returned shape {tuple(scores.shape)} for {len(images)} images; a reward must return one number per image, "
            f"shape ({len(images)},)."
        )
    bad = (~scores.isfinite()).nonzero().squeeze(1)
    if len(bad):
        first = int(bad[0])
        raise NonFiniteRewardError(
            f"{name} returned {scores[first].item()} for image {first} of {len(images)}, prompt {str(prompts[first])!r}"
        )
    return scores.to(images.device)
