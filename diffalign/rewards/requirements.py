"""What a reward needs of its prompts, said before anything is drawn."""

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from diffalign.core import Prompt


@runtime_checkable
class Demanding(Protocol):
    """A reward that needs more of a prompt than its words (metadata, a text in quotes), or that wraps one."""

    def require(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts that cannot be scored.

        Raises:
            ConfigError: names the first of them and what it lacks.
        """
        ...


@runtime_checkable
class Served(Protocol):
    """A reward that asks a server for its scores, or that wraps one."""

    def reach(self) -> None:
        """Refuse a server that is not there. Nothing is scored.

        Raises:
            ConfigError: names it, and what happened.
        """
        ...


def reach(rewards: Iterable[object]) -> None:
    """Ask every reward that has a server whether it is there.

    Raises:
        ConfigError: one is not.
    """
    for reward in rewards:
        if isinstance(reward, Served):
            reward.reach()


def require(rewards: Iterable[object], prompts: Sequence[Prompt]) -> None:
    """Ask every reward that needs more than words whether these prompts have it; other rewards take any prompt.

    Raises:
        ConfigError: a prompt lacks what a reward needs.
    """
    for reward in rewards:
        if isinstance(reward, Demanding):
            reward.require(prompts)
