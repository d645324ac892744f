"""The policy whose weights are meant, behind guidance, few-step students and other wrappers."""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from diffalign.core import Policy
from diffalign.policies import FlowMatchingPolicy


def _inwards(policy: Policy) -> Iterator[Policy]:
    """A policy, the one that it wraps, and so on along `.policy`."""
    inner: object = policy
    while isinstance(inner, Policy):
        yield inner
        inner = getattr(inner, "policy", None)


def pipeline_policy(policy: Policy) -> FlowMatchingPolicy | None:
    """The wrapped `FlowMatchingPolicy`, found along `.policy`; None where there is none."""
    return next((inner for inner in _inwards(policy) if isinstance(inner, FlowMatchingPolicy)), None)


@runtime_checkable
class Saves(Protocol):
    """A policy that writes all its weights itself, as a folder that its own `from_pretrained` reads."""

    def save(self, folder: str) -> None:
        """Write the weights."""
        ...


def saving_policy(policy: Policy) -> Saves | None:
    """The innermost policy that is wrapped along `.policy`, if it writes its weights itself."""
    *_, innermost = _inwards(policy)
    return innermost if isinstance(innermost, Saves) else None
