"""Unwrapping: finds the policy with the weights inside guidance, few-step students and other wrappers."""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from diffalign.core import Policy
from diffalign.policies import FlowMatchingPolicy


def inwards(policy: Policy) -> Iterator[Policy]:
    """Yield a policy, the policy that it wraps, and so on along `.policy`."""
    inner: object = policy
    while isinstance(inner, Policy):
        yield inner
        inner = getattr(inner, "policy", None)


def pipeline_policy(policy: Policy) -> FlowMatchingPolicy | None:
    """Wrapped `FlowMatchingPolicy`, found along `.policy`; None if there is none."""
    return next((inner for inner in inwards(policy) if isinstance(inner, FlowMatchingPolicy)), None)


@runtime_checkable
class Saves(Protocol):
    """Policy that writes all its weights itself, to a folder that its own `from_pretrained` reads."""

    def save(self, folder: str) -> None:
        """Write the weights."""
        ...


def saving_policy(policy: Policy) -> Saves | None:
    """Innermost policy along `.policy`, if it writes its weights itself; else None."""
    *_, innermost = inwards(policy)
    return innermost if isinstance(innermost, Saves) else None
