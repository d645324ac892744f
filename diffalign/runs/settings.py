"""Settings of a loop that was built in Python: its numbers and words, to be compared when the run is resumed."""

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from ..core import AlignmentLoop, Policy
from ..core.scoring import named_rewards, reward_name
from .identity import ANYWHERE

_DECIDING = ("objective", "sampler", "prompts", "aggregation", "prompts_per_step", "max_grad_norm", "lr_factor", "average", "seed")
"""Fields that decide the numbers of a run beside its rewards; the rest may change when it is resumed, as in a run file."""
_LONG = 32
"""Entries from which a list is one value."""


def settings_of(loop: AlignmentLoop) -> dict[str, Any]:
    """List the plain values of a loop and of its parts by dotted path; of a part also its class, of a reward its name alone.

    What is no plain value is left out.
    """
    found = {path: value for name in _DECIDING for path, value in _values(name, getattr(loop, name))}
    return found | {f"rewards.{name}": reward_name(reward) for name, reward in named_rewards(loop.rewards).items()}


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Say what differs between two results of `settings_of`; a value that one side lacks is not compared."""
    return [f"{path} was {old}, is now {after[path]}" for path, old in before.items() if path in after and after[path] != old]


def _values(path: str, value: object) -> Iterator[tuple[str, Any]]:
    if value is None or isinstance(value, bool | int | float | str):
        yield path, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _values(f"{path}.{key}", inner)
    elif isinstance(value, list | tuple) and len(value) > _LONG:
        yield path, f"{len(value)} entries ({zlib.crc32(repr(value).encode()):08x})"
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _values(f"{path}.{index}", inner)
    elif not isinstance(value, Policy):
        yield path, type(value).__name__
        if attrs.has(type(value)):
            for field in attrs.fields(type(value)):  # type: ignore[arg-type]  # `has` says so
                if field.init and field.name not in ANYWHERE:
                    yield from _values(f"{path}.{field.alias}", getattr(value, field.name))
