"""The policy over a diffusers pipeline behind guidance, few-step students and other wrappers."""

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
