"""Property of objectives: a run that is continued from a checkpoint goes on as if it had not stopped."""

import io
import pickle
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from diffalign.core import AlignmentLoop, Objective, Policy, Progress

from .held_policies import attributes, held
from .objective_subject import Subject
from .properties import holds

_BEFORE, _TOTAL = 2, 4
_TOLERANCE = 1e-9


@attrs.frozen(eq=False)
class _Kept:
    """Content of a checkpoint of an objective, and the reward that the next step is told.

    Args:
        weights: own tensors by role and name
        state: result of `state()`, as it is read from a file
        reward: mean reward of the step before
    """

    weights: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]
    reward: float | None

    @classmethod
    def of(cls, loop: AlignmentLoop) -> "_Kept":
        weights = {role: _own(policy) for role, policy in loop.policies().items()}
        return cls(weights, _read_back(loop.objective.state()), loop.reward)

    @torch.no_grad()
    def put_into(self, loop: AlignmentLoop) -> None:
        for role, policy in loop.policies().items():
            holds(role in self.weights, f"policies() of a new objective names {role!r}, which it did not name after {_BEFORE} steps")
            for name, parameter in policy.own_parameters().items():
                parameter.copy_(self.weights[role][name])
        if self.state:
            loop.objective.restore(self.state)
        loop.reward = self.reward


def _own(policy: Policy) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in policy.own_parameters().items()}


def _read_back(state: Mapping[str, Any]) -> Mapping[str, Any]:
    file = io.BytesIO()
    torch.save(dict(state), file)
    file.seek(0)
    try:
        read: Mapping[str, Any] = torch.load(file, weights_only=True)
    except pickle.UnpicklingError as error:
        raise AssertionError(
            f"state() must hold numbers, texts and tensors alone, or a checkpoint cannot be read: {str(error).splitlines()[0]}"
        ) from error
    return read


def require_resumption(subject: Subject) -> None:
    """Check that steps after a resume are those that the run would have made.

    Raises:
        AssertionError: they are others; the message names what was not kept, as far as it can be seen.
    """
    whole, resumed = subject.loop(), subject.loop()
    _advance(whole, 0, _BEFORE)
    kept = _Kept.of(whole)
    lost = _lost(whole, subject)
    kept.put_into(resumed)
    for loop in (whole, resumed):
        _advance(loop, _BEFORE, _TOTAL)
    for role, policy in whole.policies().items():
        other = _own(resumed.policies()[role])
        for name, parameter in _own(policy).items():
            gap, scale = float((other[name] - parameter).abs().max()), float(parameter.abs().max())
            holds(
                gap <= _TOLERANCE * max(scale, 1e-9),
                f"{_TOTAL - _BEFORE} steps after a resume, {name!r} of {role!r} differs by {gap:.3g} (its largest value is {scale:.3g}). "
                + (lost or _unlike(whole.objective, resumed.objective)),
            )


def _advance(loop: AlignmentLoop, first: int, last: int) -> None:
    for step in range(first, last):
        loop.step(loop.prompts.draw(step, loop.prompts_per_step), Progress(step, _TOTAL, loop.reward))


def _lost(loop: AlignmentLoop, subject: Subject) -> str:
    """Name a policy that has moved since the objective was built, and that no checkpoint holds; empty if there is none."""
    listed = {id(policy) for policy in loop.policies().values()}
    new = held(subject.built())
    for label, policy in held(loop.objective).items():
        moved = label in new and any(not torch.equal(tensor, _own(new[label])[name]) for name, tensor in _own(policy).items())
        if id(policy) not in listed and moved:
            return f"{label} has moved since it was built, and policies() does not name it, so no checkpoint holds it: add it there."
    return ""


def _unlike(whole: Objective, resumed: Objective) -> str:
    """Name numbers that a resumed objective does not have."""
    others = attributes(resumed)
    numbers = [name for name, value in attributes(whole).items() if isinstance(value, int | float) and value != others.get(name)]
    seen = f" (these differ: {', '.join(numbers)})" if numbers else ""
    return f"What changes from step to step must be in policies(), or in state() and restore(){seen}."
