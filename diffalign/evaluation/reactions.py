"""Reactions that change a run when its alarm rings. The alarm itself only watches."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import attrs
from torch import Tensor

from diffalign.core import Aggregation, AlignmentLoop, Devices, ScoredBatch, Stateful

Action = Literal["warn", "stop", "temper"]


class Reaction(ABC):
    """Changes a run in which the alarm has rung."""

    again: bool = False
    """True if it acts again when the fall continues; otherwise each kind of alarm rings once in a run."""

    @abstractmethod
    def act(self, loop: AlignmentLoop) -> None:
        """Change the run, after a step at which the alarm rang."""

    def resume(self, loop: AlignmentLoop) -> None:  # noqa: B027  a hook with a default
        """Change a resumed run as `act` had changed it."""


@attrs.frozen
class Warn(Reaction):
    """Changes nothing; the alarm's message is enough."""

    def act(self, loop: AlignmentLoop) -> None:
        pass


@attrs.frozen
class Stop(Reaction):
    """Ends the run after this step, as Ctrl-C does."""

    def act(self, loop: AlignmentLoop) -> None:
        loop.end()


@attrs.frozen
class Temper(Reaction):
    """Multiplies the aggregated reward by a factor, again at each alarm.

    Args:
        factor: factor below 1
    """

    factor: float
    again: bool = attrs.field(default=True, init=False)

    def act(self, loop: AlignmentLoop) -> None:
        tempered = Tempered(loop.aggregation, self.factor)
        tempered.by_alarm = True
        loop.aggregation = tempered

    def resume(self, loop: AlignmentLoop) -> None:
        self.act(loop)


def reaction(action: str, factor: float) -> Reaction:
    """Build the reaction that a run file names by a word.

    Args:
        action: value of `HackingAlarm.action`
        factor: factor of "temper"
    """
    return {"warn": Warn(), "stop": Stop(), "temper": Temper(factor)}[action]


class Tempered(Aggregation):
    """Aggregation multiplied by a factor. For an objective that multiplies rewards by beta, this means factor * beta.

    Args:
        aggregation: aggregation that is scaled; its state, if any, is passed on unchanged
        factor: positive factor

    Attributes:
        by_alarm: whether an alarm has put it around the aggregation of a run, and not the user
    """

    by_alarm: bool = False

    def __init__(self, aggregation: Aggregation, factor: float) -> None:
        self.aggregation, self.factor = aggregation, factor
        self.weights = aggregation.weights

    def observe(self, parts: Mapping[str, Tensor], group: Tensor, devices: Devices) -> None:
        self.aggregation.observe(parts, group, devices)

    def __call__(self, parts: Mapping[str, Tensor], group: Tensor) -> Tensor:
        return self.factor * self.aggregation(parts, group)

    def batch(self, *step: Any) -> ScoredBatch:
        """Make the batch of a step as the inner aggregation does, under its name."""
        return self.aggregation.batch(*step)

    def state(self) -> Mapping[str, Any]:
        """State of the inner aggregation; {} if it has none."""
        return self.aggregation.state() if isinstance(self.aggregation, Stateful) else {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `state()` gave."""
        if state and isinstance(self.aggregation, Stateful):
            self.aggregation.restore(state)


def take_back(loop: AlignmentLoop) -> None:
    """Take back what reactions have changed in a loop that goes on as the same object, so that they can be resumed from the record."""
    while isinstance(loop.aggregation, Tempered) and loop.aggregation.by_alarm:
        loop.aggregation = loop.aggregation.aggregation
