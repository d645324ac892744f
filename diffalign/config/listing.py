"""Lists of the parts and of their arguments, as text."""

import inspect
from typing import Any

from ..core import ConfigError
from . import parts
from .blueprint import described, plain
from .files import write_yaml
from .signature import MISSING, Parameter, accepts, parameters, words

_OTHER = "fits no slot"
_BROKEN = "cannot be loaded"


def everything() -> str:
    """List all parts by slot, each with its name, a line about it, and the distribution that it comes from."""
    found = [*parts.own().values(), *parts.third_party()]
    lines = []
    for slot, members in by_slot(found).items():
        meaning = (inspect.getdoc(parts.SLOTS.get(slot)) or "").partition("\n")[0] if slot in parts.SLOTS else ""
        lines.append(f"{slot}: {meaning}".rstrip())
        width = max(len(part.name) for part in members)
        lines += [f"  {part.name:<{width}}  {part.error or part.summary}{_origin(part)}".rstrip() for part in members]
        lines.append("")
    lines.append("An import path works too: package.module.Name or package.module:Name. `diffalign parts NAME` lists a part's arguments.")
    return "\n".join(lines)


def by_slot(found: list[parts.Announced]) -> dict[str, list[parts.Announced]]:
    """Group parts by the first slot that they fit, in order of name."""
    table: dict[str, list[parts.Announced]] = {slot: [] for slot in [*parts.SLOTS, _OTHER, _BROKEN]}
    for part in found:
        slots = [slot for slot, member in parts.SLOTS.items() if part.target is not None and accepts(member, part.target)]
        if part.error:
            table[_BROKEN].append(part)
        elif slots:
            table[slots[0]].append(part)
        elif part.distribution:  # a plain function counts as a reward; own classes that fit no slot are plain values
            table["Reward" if inspect.isroutine(part.target) else _OTHER].append(part)
    return {slot: sorted(members, key=lambda part: part.name) for slot, members in table.items() if members}


def _origin(part: parts.Announced) -> str:
    return f" ({part.distribution})" if part.distribution else ""


def one(name: str) -> str:
    """Describe a part and its arguments.

    Raises:
        ConfigError: there is no such part.
    """
    try:
        target = parts.find(name, parts.SLOTS.values())
    except LookupError as error:
        reason = str(error) or f"there is none.{parts.suggestion(name, parts.SLOTS.values())}"
        raise ConfigError(f"part {name!r}: {reason}") from error
    taken = arguments(target)
    lines = [parts.import_path(target, name), "", inspect.getdoc(target) or "(no description)", ""]
    width = max(map(len, taken), default=0)
    return "\n".join([*lines, *(f"  {entry:<{width}}  {text}" for entry, text in taken.items())]).rstrip()


def arguments(target: Any) -> dict[str, str]:
    """Arguments of a part by name, each with its type in words and its default."""
    taken = (parameters(target) if callable(target) else None) or {}
    return {name: in_words(parameter) for name, parameter in taken.items()}


def in_words(parameter: Parameter) -> str:
    """Describe the type and the default of one argument."""
    default = MISSING if parameter.default is MISSING else described(parameter.default, parameter.name)
    end = "required" if parameter.default is MISSING else "" if default is MISSING else f"default {_line(plain(default))}"
    return f"{words(parameter.hint)}; {end}".removesuffix("; ")


def _line(value: Any) -> str:
    if isinstance(value, dict) and "class_path" in value:
        return str(value["class_path"]).rpartition(".")[2]
    return write_yaml(value).removesuffix("\n").removesuffix("\n...") if not isinstance(value, dict) else str(value)
