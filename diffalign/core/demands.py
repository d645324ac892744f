"""Checks of what rewards need, prompts and servers, before any image is drawn."""

from collections.abc import Iterable, Sequence

from .interfaces import Demanding, Served
from .types import Prompt


def reach(parts: Iterable[object]) -> None:
    """Ask every reward that has a server whether it is there, and every part that holds rewards.

    Raises:
        ConfigError: one is not.
    """
    for part in parts:
        if isinstance(part, Served):
            part.reach()


def require(parts: Iterable[object], prompts: Sequence[Prompt]) -> None:
    """Check that prompts have what each reward needs, by itself or in a part that holds it. What is not `Demanding` takes any prompt.

    Raises:
        ConfigError: a prompt lacks what a reward needs.
    """
    for part in parts:
        if isinstance(part, Demanding):
            part.require(prompts)
