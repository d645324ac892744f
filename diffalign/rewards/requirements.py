"""Requirements of rewards on their prompts, checked before any image is drawn."""

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from diffalign.core import Prompt


@runtime_checkable
class Demanding(Protocol):
    """Reward that needs more of a prompt than its text (metadata, a text in quotes), or that wraps such a reward."""

    def require(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts that cannot be scored.

        Raises:
            ConfigError: a prompt lacks something; the message names the first such prompt and what it lacks.
        """
        ...


def require(rewards: Iterable[object], prompts: Sequence[Prompt]) -> None:
    """Check that prompts have what each reward needs. Rewards that are not `Demanding` take any prompt.

    Raises:
        ConfigError: a prompt lacks what a reward needs.
    """
    for reward in rewards:
        if isinstance(reward, Demanding):
            reward.require(prompts)
