"""Property of objectives: policies that no phase trains stay apart from those that are trained."""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.core import Objective, Policy

from .building import required
from .objective_subject import PROMPTS, Subject, trained
from .properties import NotApplicableError, holds

_KEPT = {"reference", "references", "teacher", "teachers", "old", "average", "ema", "frozen"}
"""Words in the name of a policy that must not be the trained one: it is frozen, or follows with a delay."""


def attributes(part: object) -> dict[str, Any]:
    """Values that an object holds, by name: in slots, which attrs classes have, and in its dictionary."""
    slots = [slot for kind in type(part).__mro__ for slot in vars(kind).get("__slots__", ()) if slot != "__weakref__"]
    return {**{slot: getattr(part, slot) for slot in slots if hasattr(part, slot)}, **getattr(part, "__dict__", {})}


def held(objective: Objective) -> dict[str, Policy]:
    """Policies that an objective holds: its attributes, alone or in a table or list, and what `policies()` names."""
    found = {}
    for name, value in attributes(objective).items():
        for label, entry in _entries(f".{name}", value):
            if isinstance(entry, Policy):
                found[label] = entry
    known = {id(policy) for policy in found.values()}
    return {**found, **{f"policies()[{name!r}]": policy for name, policy in objective.policies().items() if id(policy) not in known}}


def _entries(label: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((f"{label}[{key!r}]", entry) for key, entry in value.items())
    elif isinstance(value, tuple | list):
        yield from ((f"{label}[{place}]", entry) for place, entry in enumerate(value))
    else:
        yield label, value


def require_apart(subject: Subject) -> None:
    """Check that policies that are held but not trained are frozen forks, and that the constructor refuses others.

    Raises:
        AssertionError: one shares trained weights, requires gradients, changes with the trained weights, or is not refused.
    """
    objective = subject.moved()
    roles = trained(objective)
    others = {}
    for label, policy in held(objective).items():
        sharing = [role for role, known in roles.items() if _share(policy, known)]
        if not sharing:
            others[label] = policy
        elif _words(label) & _KEPT and not any(_words(label) & _words(role) & _KEPT for role in sharing):
            raise AssertionError(
                f"{label} holds the weights that the role {sharing[0]!r} trains, so it moves with every update; make it by `policy.fork()`"
            )
    for label, policy in others.items():
        loose = list(policy.trainable_parameters())
        holds(
            not loose,
            f"{label} has {len(loose)} parameters that require gradients, though no phase trains them (first: {loose[:1]}); make it by "
            "`policy.fork()`, which freezes them",
        )
    _require_unmoved(others, list(roles.values()))
    taken = _parameters(type(objective))
    for name in taken:
        _require_refusal(subject, type(objective), name)
    if not others and not taken:
        raise NotApplicableError("it holds no policy beside those that it trains, and its constructor takes no reference or teacher")


def _words(label: str) -> set[str]:
    return set(re.findall("[a-z]+", label.lower()))


def _share(policy: Policy, known: Policy) -> bool:
    moving = {id(parameter) for parameter in known.trainable_parameters().values()}
    return policy is known or any(id(parameter) in moving for parameter in policy.parameters())


def _require_unmoved(policies: Mapping[str, Policy], moving: Sequence[Policy]) -> None:
    before = {label: _velocity(policy) for label, policy in policies.items()}
    with torch.no_grad():
        for policy in moving:
            for parameter in policy.trainable_parameters().values():
                parameter.add_(0.1)
    for label, policy in policies.items():
        holds(
            torch.equal(_velocity(policy), before[label]),
            f"{label} gives other velocities once the trained weights have moved; make it by `policy.fork()`, which has tensors of its own",
        )


@torch.no_grad()
def _velocity(policy: Policy) -> Tensor:
    condition = policy.encode(PROMPTS)
    latents = policy.prior(torch.linspace(-1, 1, 4 * len(PROMPTS)).reshape(len(PROMPTS), 2, 2))
    return policy.velocity(latents, torch.full((len(PROMPTS),), 0.5).to(latents), condition)


def _parameters(kind: Callable[..., Objective]) -> list[str]:
    """Parameters `reference` and `teacher` of a constructor that needs nothing else beside the policy."""
    parameters = inspect.signature(kind).parameters
    if set(required(kind)) - {"policy", "reference", "teacher"}:
        return []
    return [name for name in ("reference", "teacher") if name in parameters and "Policy" in str(parameters[name].annotation)]


def _require_refusal(subject: Subject, kind: Callable[..., Objective], name: str) -> None:
    policy = subject.policy()
    needed = {known: policy.fork() for known in required(kind) if known != "policy"}
    try:
        kind(policy, **{**needed, name: policy.fork(trainable=True)})
    except ValueError:
        return
    raise AssertionError(f"a {name} whose weights require gradients must be refused (`diffalign.core.require_frozen` does)")
