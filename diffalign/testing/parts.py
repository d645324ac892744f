"""Examination of a part: finds its kind, builds it with its defaults, and chooses the contract."""

from collections.abc import Sequence
from typing import Any

import attrs

from diffalign.core import Objective, Policy, Reward, TrajectorySampler

from .building import built, require_from_policy, required
from .objective_contract import OBJECTIVE
from .objective_subject import subject_of
from .policy_contract import POLICY
from .properties import Property
from .reward_contract import REWARD, cases
from .sampler_contract import SAMPLER


@attrs.frozen(eq=False)
class Examination:
    """Part with the contract of its kind.

    Args:
        kind: "policy", "sampler", "objective" or "reward"
        subject: argument of the checks
        properties: the contract
    """

    kind: str
    subject: Any
    properties: Sequence[Property[Any]]


def examination(part: Any) -> Examination:
    """Find the contract that a part must keep.

    Args:
        part: a class of a policy, sampler, objective or reward whose other arguments have defaults; an object of one; a function that
            takes a policy and gives an objective (its parameter is called `policy`); or a reward function of (images, prompts)

    Raises:
        ValueError: it is none of these, or cannot be built with its defaults.
    """
    if isinstance(part, type) and issubclass(part, Objective):
        return Examination("objective", subject_of(part), OBJECTIVE)
    if isinstance(part, type) and issubclass(part, Policy | TrajectorySampler | Reward):
        part = built(part)
    if isinstance(part, Policy):
        return Examination("policy", part, POLICY)
    if isinstance(part, TrajectorySampler):
        return Examination("sampler", part, SAMPLER)
    if isinstance(part, Reward):
        return Examination("reward", cases(part), REWARD)
    parameters = required(part) if callable(part) else []
    if parameters == ["policy"]:
        return Examination("objective", subject_of(part), OBJECTIVE)
    if "policy" in parameters:
        require_from_policy(part)
    if len(parameters) == 2:
        return Examination("reward", cases(part), REWARD)
    if callable(part) and not parameters:
        return examination(part())
    raise ValueError(
        f"{_name(part)} must be a policy, a sampler, an objective or a reward, or a function that gives one: of no argument, of `policy` "
        "for an objective, of (images, prompts) for a reward that is a function"
    )


def _name(part: Any) -> str:
    return str(getattr(part, "__name__", type(part).__name__))
