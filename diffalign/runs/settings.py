"""Settings of a loop that was built in Python: its numbers and words, to be compared when the run is resumed."""

import inspect
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
from torch import Tensor

from ..core import AlignmentLoop, Objective, Policy, Stateful
from ..core.learning_rates import adamw
from ..core.scoring import named_rewards, reward_name
from .identity import ANYWHERE

OPTIMIZERS = "optimizers."
"""Beginning of the paths of what optimizers are given."""

_DECIDING = ("objective", "sampler", "prompts", "aggregation", "prompts_per_step", "max_grad_norm", "lr_factor", "average", "seed")
"""Fields that decide the numbers of a run beside its rewards; the rest may change when it is resumed, as in a run file."""

_LONG = 32
"""Entries from which a list is one value."""


def settings_of(loop: AlignmentLoop, total: int) -> dict[str, Any]:
    """List the plain values of a loop and of its parts by dotted path; of a part also its class, of a reward its name alone.

    The number of steps is among them, because schedules depend on it.

    What is no plain value is left out, and so is what a part moves itself (`state`). Of an optimizer it is what was given, not what a
    schedule has made of it.
    """
    found = {path: value for name in _DECIDING for path, value in _values(name, getattr(loop, name), ())}
    rewards = {name: reward_name(reward) for name, reward in named_rewards(loop.rewards).items()}
    found |= {"rewards": ", ".join(rewards), **{f"rewards.{name}": reward for name, reward in rewards.items()}}
    for role in loop.running:
        factory = loop.optimizers.get(role, loop.optimizers.get("default", adamw))
        found |= {f"{OPTIMIZERS}{role}.{name}": value for name, value in _given(factory).items()}
    return {"total": int(total), **found}


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, str]:
    """Say what differs between two results of `settings_of`, by path; a value that one side lacks is not compared."""
    both = {path: (old, after[path]) for path, old in before.items() if path in after}
    return {path: f"{path} was {old}, is now {new}" for path, (old, new) in both.items() if repr(old) != repr(new)}


def _given(factory: Callable[..., Any]) -> dict[str, Any]:
    """Plain arguments of an optimizer's factory, given or usual."""
    try:
        known = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # written in C
        return {}
    return {each.name: each.default for each in known if isinstance(each.default, bool | int | float | str)}


def _values(path: str, value: object, around: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
    if _is_plain(value):
        yield path, value
    elif isinstance(value, list | tuple) and len(value) > _LONG and all(map(_is_plain, value)):
        yield path, f"{len(value)} entries ({zlib.crc32(repr(value).encode(errors='replace')):08x})"
    elif isinstance(value, Mapping | list | tuple):
        yield path, f"{len(value)} entries"
        if len(value) <= _LONG:
            for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
                yield from _values(f"{path}.{key}", inner, around)
    elif not isinstance(value, Policy):
        yield path, type(value).__name__
        if attrs.has(type(value)) and id(value) not in around:
            state = value.state() if isinstance(value, Stateful | Objective) else {}
            inside = (*around, id(value))
            for field in attrs.fields(type(value)):  # type: ignore[arg-type]  # `has` says so
                if not field.init or field.name in ANYWHERE:
                    continue
                given = getattr(value, field.name)
                if not any(name in state and _are_equal(given, state[name], inside) for name in (field.alias, field.name)):
                    yield from _values(f"{path}.{field.alias}", given, inside)


def _are_equal(field: object, moved: object, around: tuple[int, ...]) -> bool:
    """Say whether a field is what stands in the state under its name: a budget called beta is not the beta that it has found."""
    kept = moved.item() if isinstance(moved, Tensor) and moved.numel() == 1 else moved
    here, there = ([*_values("", value, around)] for value in (field, kept))
    return here == there or repr(here) == repr(there)  # nan is not equal to itself


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str)
