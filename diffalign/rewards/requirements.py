"""Requirements of rewards on their prompts, checked before any image is drawn."""

from collections.abc import Iterable, Sequence

from diffalign.core import Demanding, Prompt
from diffalign.core.interfaces import Served


def reach(rewards: Iterable[object]) -> None:
    """Ask every reward that has a server whether it is there.

    Raises:
        ConfigError: one is not.
    """
    for reward in rewards:
        if isinstance(reward, Served):
            reward.reach()


def require(rewards: Iterable[object], prompts: Sequence[Prompt]) -> None:
    """Check that prompts have what each reward needs. Rewards that are not `Demanding` take any prompt.

    Raises:
        ConfigError: a prompt lacks what a reward needs.
    """
    for reward in rewards:
        if isinstance(reward, Demanding):
            reward.require(prompts)
