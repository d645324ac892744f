"""Rewards inside other rewards. A reward inside another is given images and prompts alone: neither groups nor the step."""

from collections.abc import Iterator, Mapping
from typing import Protocol, runtime_checkable

from .interfaces import GroupReward, Reward, RewardFunction, StepReward


@runtime_checkable
class Around(Protocol):
    """Reward that scores by another one."""

    @property
    def reward(self) -> RewardFunction:
        """The reward inside."""
        ...


@runtime_checkable
class Combining(Protocol):
    """Reward that scores by several others."""

    @property
    def rewards(self) -> Mapping[str, RewardFunction]:
        """The rewards inside, by name."""
        ...


def rewards_inside(reward: RewardFunction) -> Iterator[tuple[RewardFunction, Reward]]:
    """Find the rewards inside a reward, at any depth, each with the one that holds it. Plain functions are left out."""
    held: list[object] = [reward.reward] if isinstance(reward, Around) else []
    if isinstance(reward, Combining) and isinstance(reward.rewards, Mapping):
        held += reward.rewards.values()
    for inside in held:
        if isinstance(inside, Reward):
            yield reward, inside
            yield from rewards_inside(inside)


def require_outermost(name: str, reward: RewardFunction) -> None:
    """Refuse a reward of a run that holds one inside which must be told more than the other can tell.

    Raises:
        ValueError: a `StepReward` or a `GroupReward` lies inside another reward; the message names both.
    """
    for outer, inside in rewards_inside(reward):
        untold = ""
        if isinstance(inside, StepReward) and not isinstance(outer, StepReward):
            untold = "which step is scored"
        elif isinstance(inside, GroupReward) and not isinstance(outer, StepReward | GroupReward):
            untold = "which pictures are of one prompt"
        if untold:
            kind, around = type(inside).__name__, type(outer).__name__
            raise ValueError(
                f"rewards[{name!r}] must not hold {kind} inside {around}, which cannot tell it {untold}. Name {kind} itself among the "
                "rewards of the run."
            )


def require_single(where: str, reward: RewardFunction, advice: str) -> None:
    """Refuse a reward that does not score each image on its own, where images come in any portions.

    Args:
        where: name of what must score each image on its own, in the message
        reward: the reward
        advice: end of the message, which says how to do it

    Raises:
        ValueError: it is, or holds, a `GroupReward` or a `StepReward`.
    """
    for inside in (reward, *(inside for _, inside in rewards_inside(reward))):
        if isinstance(inside, GroupReward | StepReward):
            told = "must see all pictures of a prompt" if isinstance(inside, GroupReward) else "must be told the step of a run"
            raise ValueError(f"{where} must score each image on its own; got {type(inside).__name__}, which {told}. {advice}")
