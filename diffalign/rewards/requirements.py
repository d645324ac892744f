"""What a reward needs of its prompts, said before anything is drawn."""

from collections.abc import Iterable, Sequence

from diffalign.core import Demanding, Prompt


def require(rewards: Iterable[object], prompts: Sequence[Prompt]) -> None:
    """Ask every reward that needs more than words whether these prompts have it; other rewards take any prompt.

    Raises:
        ConfigError: a prompt lacks what a reward needs.
    """
    for reward in rewards:
        if isinstance(reward, Demanding):
            reward.require(prompts)
