"""Calls of rewards; refuses a result that is not one finite number per image."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .errors import NonFiniteRewardError, RewardError
from .interfaces import RewardFunction
from .types import Prompt


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
    return named


@torch.no_grad()
def score(rewards: Mapping[str, RewardFunction], images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """Score images: raw scores by reward name, each [K], float32, on the device of the images.

    Raises:
        RewardError: a reward raised, or returned another shape, or a number that is not finite.
    """
    return {name: _checked(name, reward, images, prompts) for name, reward in rewards.items()}


def _checked(name: str, reward: RewardFunction, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    try:
        result = reward(images, prompts)
    except torch.OutOfMemoryError:  # not a fault of the reward: fewer images at once may fit
        raise
    except Exception as error:
        raise RewardError(f"reward {name!r} raised {type(error).__name__} for {len(images)} images: {error}") from error
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
