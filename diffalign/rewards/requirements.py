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


def require(rewards: Iterable[object], prompts: Sequence[Prompt]) -> None:
    """Ask every reward that needs more than words whether these prompts have it; other rewards take any prompt.

    Raises:
        ConfigError: a prompt lacks what a reward needs.
    """
    for reward in rewards:
        if isinstance(reward, Demanding):
            reward.require(prompts)
