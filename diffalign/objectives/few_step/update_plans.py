"""Update plans: which roles step together, in which order and how often."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping

import attrs

from diffalign.core import Loss, Phase, Policy, ScoredBatch, UpdateRows

Losses = Callable[[ScoredBatch, int], Iterator[Loss]]


@attrs.frozen(eq=False)
class Role:
    """A policy that is trained, and its losses.

    Args:
        policy: the weights
        losses: (batch, update index) -> micro-batches
    """

    policy: Policy
    losses: Losses


class UpdatePlan(ABC):
    """Arranges the roles of an objective in phases."""

    @abstractmethod
    def phases(self, roles: Mapping[str, Role]) -> tuple[Phase, ...]:
        """The phases, for roles in the order of the paper: (surrogate,) fake, generator."""


def _resting(losses: Losses, warmup: int) -> Losses:
    """Losses that begin after `warmup` steps of the run; before, there is no gradient and nothing moves."""

    def awake(batch: ScoredBatch, update: int) -> Iterator[Loss]:
        if batch.progress.step >= warmup:
            yield from losses(batch, update)

    return awake


@attrs.frozen
class Together(UpdatePlan):
    """One phase: the gradients of all roles are taken at the same weights, then each steps once, as in the TDM-R1 release.

    Args:
        warmup: steps of the run in which the generator rests
    """

    warmup: int = attrs.field(default=0, validator=attrs.validators.ge(0))

    def phases(self, roles: Mapping[str, Role]) -> tuple[Phase, ...]:
        def losses(batch: ScoredBatch, update: int) -> Iterator[Loss]:
            for name, role in roles.items():
                yield from (_resting(role.losses, self.warmup) if name == "generator" else role.losses)(batch, update)

        return (Phase({name: role.policy for name, role in roles.items()}, losses),)


@attrs.frozen
class InOrder(UpdatePlan):
    """A phase for each role: the fake learns, then the generator meets the fake that has learned, as in the papers.

    Args:
        repeats: updates by role, 1 where it is not named; {"fake": 5} is a two-timescale rule
        warmup: steps of the run in which the generator rests
    """

    repeats: Mapping[str, int] = attrs.field(factory=dict)
    warmup: int = attrs.field(default=0, validator=attrs.validators.ge(0))

    def phases(self, roles: Mapping[str, Role]) -> tuple[Phase, ...]:
        if strangers := sorted(set(self.repeats) - set(roles)):
            raise ValueError(f"InOrder.repeats names the role {strangers[0]!r}; the roles are {', '.join(roles)}")
        return tuple(
            Phase(
                {name: role.policy},
                _resting(role.losses, self.warmup) if name == "generator" else role.losses,
                self.repeats.get(name, 1),
            )
            for name, role in roles.items()
        )


def evaluated_in(phases: Iterable[Phase], by_role: Mapping[str, UpdateRows]) -> UpdateRows:
    """Network rows of the updates of a step for one prompt.

    Args:
        phases: phases of the step
        by_role: rows of one update of each role that they train
    """
    return sum((by_role[role] * phase.repeats for phase in phases for role in phase.trains), UpdateRows())
