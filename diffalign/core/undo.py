"""Copies of weights, optimizers and state, taken when a step begins."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from .interfaces import Objective, Planned, Stateful, TrajectorySampler
from .policy import Policy


@attrs.frozen(eq=False)
class Undo:
    """Copy of everything that an update may change; a call puts it back.

    Args:
        values: tensors, each with a copy of its values
        optimizers: optimizers, each with a copy of its state
        objective: objective that has the state
        state: state of the objective, beside the weights
    """

    values: list[tuple[nn.Parameter, Tensor]]
    optimizers: list[tuple[torch.optim.Optimizer, dict[str, Any]]]
    objective: Objective
    state: Mapping[str, Any]

    @classmethod
    def remember(cls, objective: Objective, trained: Mapping[str, Policy], running: Mapping[str, torch.optim.Optimizer]) -> "Undo":
        """Copy the trained tensors, and those of other policies that the objective moves after an update.

        Args:
            objective: objective of the run
            trained: role -> weights that optimizers step
            running: role -> optimizer
        """
        tensors = {id(p): p for policy in trained.values() for p in policy.trainable_parameters().values()}
        if type(objective).after_update is not Objective.after_update:
            tensors |= {id(p): p for policy in objective.policies().values() for p in policy.own_parameters().values()}
        return cls(
            [(parameter, parameter.detach().clone()) for parameter in tensors.values()],
            [(optimizer, copy.deepcopy(optimizer.state_dict())) for optimizer in running.values()],
            objective,
            copy.deepcopy(dict(objective.state())),
        )

    @torch.no_grad()
    def __call__(self) -> None:
        for parameter, value in self.values:
            parameter.copy_(value)
        for optimizer, state in self.optimizers:
            optimizer.load_state_dict(state)
        if self.state:
            self.objective.restore(self.state)


def rewind_of(sampler: TrajectorySampler) -> Callable[[TrajectorySampler], None]:
    """Copy what a sampler and its plan remember.

    Returns:
        Function that puts it back, into this sampler or one of its kind: a step that is repeated must not count twice.
    """
    before = {name: copy.deepcopy(dict(part.state())) for name, part in stateful_parts(sampler).items()}

    def rewind(other: TrajectorySampler) -> None:
        for name, part in stateful_parts(other).items():
            part.restore(copy.deepcopy(before[name]))  # a step may be repeated twice

    return rewind


def stateful_parts(sampler: TrajectorySampler) -> dict[str, Stateful]:
    """A sampler and its plan, those of them that depend on earlier steps, by name."""
    parts = {"sampler": sampler, "plan": sampler.plan if isinstance(sampler, Planned) else None}
    return {name: part for name, part in parts.items() if isinstance(part, Stateful)}
