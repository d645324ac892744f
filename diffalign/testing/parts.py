"""Examination of a part: finds its kind, builds it with its defaults, and chooses the contract."""

from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any, NoReturn

import attrs

from diffalign.core import Aggregation, ConfigError, Objective, Policy, Prompt, Reward, RewardFunction, TrajectorySampler
from diffalign.core.demands import require

from .building import built, require_from_policy, required
from .objective_contract import OBJECTIVE
from .objective_subject import subject_of
from .policy_contract import POLICY
from .properties import Property
from .reward_contract import REWARD, Scored, cases
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


def examination(part: Any, prompts: Sequence[Prompt] | None = None) -> Examination:
    """Find the contract that a part must keep.

    Args:
        part: a class of a policy, sampler, objective or reward whose other arguments have defaults; an object of one; a function that
            takes a policy and gives an objective (its parameter is called `policy`); or a reward function of (images, prompts)
        prompts: prompts for a reward, at least one; None gives it captions of ShapeWorld

    Raises:
        ConfigError: it is a reward that cannot score these prompts.
        ValueError: it is none of these, or cannot be built with its defaults; or it is given prompts and is no reward.
    """
    found = _examination(part, prompts)
    if prompts is not None and found.kind != "reward":
        raise ValueError(f"{_name(part)} must be a reward to be given prompts; its kind is: {found.kind}")
    return found


def _examination(part: Any, prompts: Sequence[Prompt] | None) -> Examination:
    if isinstance(part, Aggregation) or (isinstance(part, type) and issubclass(part, Aggregation)):
        _refuse_aggregation(part)
    if isinstance(part, type) and issubclass(part, Objective):
        return Examination("objective", subject_of(part), OBJECTIVE)
    if isinstance(part, type) and issubclass(part, Policy | TrajectorySampler | Reward):
        part = built(part)
    if isinstance(part, Policy):
        return Examination("policy", part, POLICY)
    if isinstance(part, TrajectorySampler):
        return Examination("sampler", part, SAMPLER)
    if isinstance(part, Reward):
        return Examination("reward", _scored(part, prompts), REWARD)
    parameters = required(part) if callable(part) else []
    if parameters == ["policy"]:
        return Examination("objective", subject_of(part), OBJECTIVE)
    if "policy" in parameters:
        require_from_policy(part)
    if parameters == ["parts", "group"]:
        _refuse_aggregation(part)
    if len(parameters) == 2:
        return Examination("reward", _scored(part, prompts), REWARD)
    if callable(part) and not parameters:
        return _examination(part(), prompts)
    raise ValueError(
        f"{_name(part)} must be a policy, a sampler, an objective or a reward, or a function that gives one: of no argument, of `policy` "
        "for an objective, of (images, prompts) for a reward that is a function"
    )


def _refuse_aggregation(part: Any) -> NoReturn:
    raise ValueError(
        f"{_name(part)} must be a policy, a sampler, an objective or a reward to be checked; it is an aggregation, which has no contract "
        "of its own. Try it in a run file, `aggregation: PACKAGE.NAME`: `diffalign check RUN --try` does one step, and refuses rewards "
        "that are not one finite number per sample."
    )


def _scored(reward: RewardFunction, prompts: Sequence[Prompt] | None) -> Scored:
    """Combine a reward with the eight pictures and with prompts that it understands, the first eight of those given, again from the first.

    Raises:
        ConfigError: it cannot score one of them.
    """
    found = cases(reward)
    try:
        require([reward], found.prompts if prompts is None else prompts)
    except ConfigError as error:
        if prompts is not None:
            raise
        raise ConfigError(
            f"{error}. This is a caption of ShapeWorld, with which rewards are checked if nothing else is said. Give prompts that the "
            "reward understands: `diffalign check-part --prompts FILE`, or `check_reward(reward, prompts)` in a test."
        ) from error
    return found if prompts is None else cases(reward, list(islice(cycle(prompts), len(found.images))), found.images)


def _name(part: Any) -> str:
    return str(getattr(part, "__name__", type(part).__name__))
