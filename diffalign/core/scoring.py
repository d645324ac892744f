"""Calls of rewards; refuses a result that is not one finite number per image."""

import inspect
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from .contract import due
from .errors import ConfigError, NonFiniteRewardError, RewardError
from .interfaces import Attended, Demanding, GroupReward, PromptSource, Reward, RewardFunction, Served, Sourced, StepReward
from .nesting import require_outermost
from .own_line import at_own_line
from .scores import Partial, Scores
from .types import Progress, Prompt


def reward_name(reward: object) -> str:
    """The name of a function, or of the class of an object."""
    return getattr(reward, "__name__", type(reward).__name__)


_TAKEN = "group_std"


def named_rewards(rewards: RewardFunction | Mapping[str, RewardFunction]) -> dict[str, RewardFunction]:
    """Rewards by name; a single reward gets its own name.

    Raises:
        ValueError: there is none, or one cannot be called as a reward, or holds another one that must stand under its own name, or has a
            name that metrics cannot carry.
    """
    named = dict(rewards) if isinstance(rewards, Mapping) else {reward_name(rewards): rewards}
    if not named:
        raise ValueError("rewards must name at least one reward; got none")
    for name, reward in named.items():
        if not name or "/" in name or name == _TAKEN:
            raise ValueError(
                f"rewards must have names that metrics can carry, reward/NAME and reward/NAME/SOURCE: not empty, without '/', and not "
                f"{_TAKEN!r}, which is the deviation within groups; got {name!r}"
            )
        if not callable(reward):
            raise ValueError(f"rewards[{name!r}] must be callable with (images, prompts); got {type(reward).__name__}")
        require_order(name, reward)
        require_outermost(name, inner(reward))
    return named


_IMAGES = frozenset(("image", "images", "pictures", "pixels", "imgs"))
_PROMPTS = frozenset(("prompt", "prompts", "texts", "captions"))


def require_order(name: str, reward: RewardFunction) -> None:
    """Refuse a reward that cannot be called with (images, prompts), or names them in the other order.

    Raises:
        ValueError: it does, or it is a class that was not called.
    """
    if inspect.isclass(reward):
        raise ValueError(f"rewards[{name!r}] must be a reward; got the class {reward.__name__} itself; call it: {reward.__name__}(...)")
    try:
        signature = inspect.signature(reward)
    except (TypeError, ValueError):  # written in C: its call will tell
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise ValueError(f"rewards[{name!r}] must take two arguments, (images, prompts); it takes {signature}") from error
    first, second = [*signature.parameters, "", ""][:2]
    if first in _PROMPTS and second in _IMAGES:
        raise ValueError(f"rewards[{name!r}] must take (images, prompts), in this order; it takes ({first}, {second}). Exchange them.")


@attrs.frozen(eq=False)
class OfSources(Reward):
    """Reward that applies only to the prompts of some sources, and to those that name none.

    Args:
        reward: reward that scores
        sources: names of sources
    """

    reward: RewardFunction
    sources: tuple[str, ...]

    def applies(self, prompt: str) -> bool:
        """Say whether an image of this prompt is scored."""
        source = Prompt.of(prompt).source
        return source is None or source in self.sources

    def reach(self) -> None:
        """Check the server of the inner reward."""
        if isinstance(self.reward, Served):
            self.reward.reach()

    def require(self, prompts: Sequence[Prompt]) -> None:
        """Ask the inner reward about its own prompts only."""
        if isinstance(self.reward, Demanding):
            self.reward.require([prompt for prompt in prompts if self.applies(prompt)])

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor | Partial:
        return score({reward_name(self.reward): self}, images, prompts).partial(reward_name(self.reward))


def rewards_by_source(rewards: Mapping[str, RewardFunction], prompts: PromptSource) -> dict[str, RewardFunction]:
    """Hold each reward of a run to the sources of prompts that it belongs to; without sources, return the rewards as they are.

    Raises:
        ConfigError: a source names a reward that there is not, or a reward belongs to no source.
    """
    if not isinstance(prompts, Sourced):
        return dict(rewards)
    for source, names in prompts.rewarded.items():
        for name in names or ():
            if name not in rewards:
                raise ConfigError(
                    f"prompts.sources.{source}.rewards must name rewards of the run, which are {', '.join(rewards)}; got {name!r}"
                )
    held: dict[str, RewardFunction] = {}
    for name, reward in rewards.items():
        sources = tuple(source for source, names in prompts.rewarded.items() if names is None or name in names)
        if not sources:
            raise ConfigError(
                f"the reward {name!r} belongs to no source of prompts. Name it in prompts.sources.NAME.rewards, or remove it."
            )
        held[name] = reward if len(sources) == len(prompts.rewarded) else OfSources(reward, sources)
    return held


def together(rewards: Mapping[str, RewardFunction]) -> set[str]:
    """Names of the rewards that score all images of a prompt together, so that groups must not be cut."""
    return {name for name, reward in rewards.items() if isinstance(inner(reward), GroupReward)}


def hooks_of(rewards: Mapping[str, RewardFunction]) -> list[Any]:
    """Hooks that rewards bring along."""
    held: list[object] = [inner(reward) for reward in rewards.values()]
    return [reward.hook() for reward in held if isinstance(reward, Attended)]


def inner(reward: RewardFunction) -> RewardFunction:
    """The reward itself, where it is held to some sources of prompts."""
    return reward.reward if isinstance(reward, OfSources) else reward


@torch.no_grad()
def score(
    rewards: Mapping[str, RewardFunction],
    images: Tensor,
    prompts: Sequence[Prompt],
    group: Tensor | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Score images: raw scores by reward name, each [K], float32, on the device of the images.

    Args:
        rewards: by name
        images: [K, 3, H, W]
        prompts: K
        group: group of each image, [K], each group whole; None if the groups are not known
        progress: progress of the run, if these are the images of a training step

    Raises:
        RewardError: a reward raised, changed the images, or returned another shape or a number that is not finite; or a reward scores
            the images of a prompt together, and it is not known which they are.
    """
    return Scores({name: _scored(name, reward, images, prompts, group, progress) for name, reward in rewards.items()})


def _scored(
    name: str, reward: RewardFunction, images: Tensor, prompts: Sequence[Prompt], group: Tensor | None, progress: Progress | None
) -> Tensor | Partial:
    """Score the images to whose prompts the reward belongs."""
    if not isinstance(reward, OfSources):
        return _checked(name, reward, images, prompts, group, progress)
    applies = torch.tensor([reward.applies(prompt) for prompt in prompts], dtype=torch.bool, device=images.device)
    places = [place for place, prompt in enumerate(prompts) if reward.applies(prompt)]
    if len(places) == len(prompts):
        return _checked(name, reward.reward, images, prompts, group, progress)
    values = torch.zeros(len(images), device=images.device)
    if not places:
        return Partial(values, applies)
    chosen = None if group is None else group[places]
    found = _checked(name, reward.reward, images[places], [prompts[place] for place in places], chosen, progress)
    part = found if isinstance(found, Partial) else Partial(found, torch.ones_like(found, dtype=torch.bool))
    index = torch.tensor(places, device=images.device)
    return Partial(values.scatter(0, index, part.values), applies.scatter(0, index, part.applies))


def _fingerprint(images: Tensor, thorough: bool) -> tuple[int, int]:
    """Changes with the images: how often torch has written into them, and, on the host, a checksum of their bits, for what numpy writes.

    The checksum depends on places, too: OpenCV swaps channels in place. On a device nothing else writes, and nothing is waited for.

    Args:
        images: pictures that a reward is given
        thorough: whether the checksum is taken, which costs as much as a small reward
    """
    version = 0 if images.is_inference() else images._version
    if images.device.type != "cpu" or not (thorough or images.is_inference()):
        return version, 0
    bits = images.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[images.element_size()])
    return version, zlib.crc32(bits.contiguous().numpy().data)


def _called(
    reward: RewardFunction, images: Tensor, prompts: Sequence[Prompt], group: Tensor | None, progress: Progress | None
) -> Tensor | Partial:
    if isinstance(reward, StepReward) and group is not None and progress is not None:
        return reward.of_step(images, prompts, group, progress)
    if isinstance(reward, GroupReward) and group is not None:
        return reward.of_groups(images, prompts, group)
    return reward(images, prompts)


def _checked(
    name: str, reward: RewardFunction, images: Tensor, prompts: Sequence[Prompt], group: Tensor | None, progress: Progress | None
) -> Tensor | Partial:
    if isinstance(reward, GroupReward) and group is None:
        raise RewardError(
            f"reward {name!r} scores all pictures of a prompt together, and here it cannot be known which they are. Name it among the "
            "rewards of the run, not inside another reward and not in an alarm."
        )
    thorough = progress is None or due(progress.step)  # who writes with numpy does it at each step
    before = _fingerprint(images, thorough)
    try:
        result = _called(reward, images, prompts, group, progress)
    except torch.OutOfMemoryError:  # not a fault of the reward: fewer images at once may fit
        raise
    except Exception as error:
        said = f"reward {name!r} raised {type(error).__name__} for {len(images)} images: {error}{at_own_line(error)}"
        raise RewardError(said) from error
    if _fingerprint(images, thorough) != before:
        raise RewardError(
            f"reward {name!r} must not change the images that it is given: other rewards and the record see the same ones. Let it work on "
            "a copy, images.clone()."
        )
    result, applies = (result.values, result.applies) if isinstance(result, Partial) else (result, None)
    try:
        scores = torch.as_tensor(result, dtype=torch.float32).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise RewardError(f"reward {name!r} must return numbers, shape ({len(images)},); got {type(result).__name__}: {error}") from error
    if scores.shape != (len(images),):
        raise RewardError(
            f"{name} returned shape {tuple(scores.shape)} for {len(images)} images; a reward must return one number per image, "
            f"shape ({len(images)},)."
        )
    if applies is not None:  # what has no score is not looked at
        applies = applies.to(scores.device)
        scores = torch.where(applies, scores, torch.zeros_like(scores))
    bad = (~scores.isfinite()).nonzero().squeeze(1)
    if len(bad):
        first = int(bad[0])
        raise NonFiniteRewardError(
            f"{name} returned {scores[first].item()} for image {first} of {len(images)}, prompt {str(prompts[first])!r}"
        )
    scores = scores.to(images.device)
    return scores if applies is None else Partial(scores, applies.to(images.device))
