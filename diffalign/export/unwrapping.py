"""The policy whose weights are meant, behind guidance, few-step students and other wrappers."""

from typing import Protocol, runtime_checkable

from diffalign.core import Policy
from diffalign.policies import FlowMatchingPolicy


def pipeline_policy(policy: Policy) -> FlowMatchingPolicy | None:
    """The wrapped `FlowMatchingPolicy`, found along `.policy`; None where there is none, so that nothing can be exported."""
    inner: object = policy
    while isinstance(inner, Policy):
        if isinstance(inner, FlowMatchingPolicy):
            return inner
        inner = getattr(inner, "policy", None)
    return None


@runtime_checkable
class Saves(Protocol):
    """A policy that writes all its weights itself, as a folder that its own `from_pretrained` reads."""

    def save(self, folder: str) -> None:
        """Write the weights."""
        ...


def saving_policy(policy: Policy) -> Saves | None:
    """The innermost policy that is wrapped along `.policy`, if it writes its weights itself."""
    inner: object = policy
    while isinstance(deeper := getattr(inner, "policy", None), Policy):
        inner = deeper
    return inner if isinstance(inner, Saves) else None
