"""Resolution of a run file: finds every part with its class and all its arguments, and checks them.

Every value has a place, its dotted path without `init_args`, as on the command line: sampler.plan.eta.
"""

import inspect
import warnings
from abc import ABCMeta
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from ..core import ConfigError, Objective, Policy, PromptSource, Sharding
from . import parts
from .blueprint import Part, described
from .errors import ConfigWarning, listed, nearest, shown
from .overrides import Argument, Inherited, inherited
from .signature import (
    MISSING,
    Parameter,
    accepts,
    alternatives,
    check,
    is_slot,
    item_of,
    parameters,
    supplied,
    value_of,
    words,
)

_KEYS = ("class_path", "init_args")

_USUAL: Mapping[Any, str] = {PromptSource: "PromptFile"}
"""Kind of a part -> class that a mapping of arguments means, wherever such a part belongs, if it names none."""

_OF_A_LIST: Mapping[Any, tuple[str, str]] = {PromptSource: ("Prompts", "prompts")}
"""Kind of a part -> class that a list means, and its argument that takes the list."""


def resolve(value: Any, parameter: Parameter, where: str) -> Any:
    """Resolve a value of a run file into plain values and `Part`s.

    Args:
        value: value from the file, or an `Argument` of the command line
        parameter: parameter that gets the value
        where: place of the value

    Raises:
        ConfigError: the value does not fit the parameter.
    """
    if isinstance(value, Part):  # part of a default, resolved already
        return value
    typed = value if isinstance(value, Argument) else None
    value = value if typed is None else typed.value
    members = alternatives(parameter.hint)
    slots = [member for member in members if is_slot(member)]
    mapped = any(value_of(member) is not MISSING for member in members)  # then a mapping is one
    usual = parameter.usual or next((_USUAL[slot] for slot in slots if slot in _USUAL and not mapped), "")
    parameter = attrs.evolve(parameter, usual=usual)
    if isinstance(value, Mapping):
        implied = _implied(value, parameter.default, slots, where)
        if slots and parameter.usual and implied is None and not set(value) & set(_KEYS):
            value = {"class_path": parameter.usual, "init_args": value}
        if slots and ("class_path" in value or implied is not None):
            return _part(_owned(value, parameter, slots, where), slots, where, implied, words(parameter.hint))
        for member in members:
            if (inner := value_of(member)) is not MISSING:
                entries = {_key(key, where): Parameter(str(key), inner, usual=parameter.usual) for key in _kept(value, inner, where)}
                return {key: resolve(value[key], entry, f"{where}.{key}") for key, entry in entries.items()}
        if slots:
            raise ConfigError(
                f"{where} must name its class: class_path, one of {listed(parts.candidates(slots))}, and its arguments as init_args; "
                f"got the keys {listed(map(str, value), 'and')}"
            )
    elif isinstance(value, list | tuple):
        for member in members:
            if (inner := item_of(member)) is not MISSING:
                items = [resolve(entry, Parameter("", inner), f"{where}.{place}") for place, entry in enumerate(value)]
                return items if member is list or getattr(member, "__origin__", None) is list else tuple(items)
        for slot in slots:
            if slot in _OF_A_LIST:
                name, argument = _OF_A_LIST[slot]
                return _part({"class_path": name, "init_args": {argument: value}}, slots, where, None, words(parameter.hint))
    elif isinstance(value, str) and slots and str not in members:
        instead: Mapping[str, Any] = {}
        if typed is not None:
            typed.require_read()
            instead = typed.instead or {}
        given = inherited(instead, None) if _takes(instead, parameter, slots, where) else {}
        return _part(_owned({"class_path": value, "init_args": given}, parameter, slots, where), slots, where, None, words(parameter.hint))
    return _plain(value, typed, members, parameter.hint, where)


def _plain(value: Any, typed: Argument | None, members: Sequence[Any], hint: Any, where: str) -> Any:
    value = _unwrapped(value)
    for candidate in [value] if typed is None or isinstance(value, str) else [value, typed.text]:
        try:
            return check(candidate, members)
        except TypeError:
            continue
    if typed is not None:
        typed.require_read()
    raise ConfigError(f"{where} must be {words(hint)}; got {shown(value if typed is None else typed.text)}")


def _unwrapped(value: Any) -> Any:
    if isinstance(value, Argument | Inherited):
        return _unwrapped(value.value)
    if isinstance(value, Mapping):
        return {key: _unwrapped(entry) for key, entry in value.items()}
    return [_unwrapped(entry) for entry in value] if isinstance(value, list) else value


def _kept(value: Mapping[Any, Any], inner: Any, where: str) -> list[Any]:
    """List the keys of a mapping without those that the command line drops by null. Where null is a value of its own, none is dropped.

    Raises:
        ConfigError: there is no such entry in the run file, or it is the last one.
    """
    if any(member in (None, type(None), Any) for member in alternatives(inner)):
        return list(value)
    dropped = [key for key, entry in value.items() if isinstance(entry, Argument) and entry.value is None]
    kept = [key for key in value if key not in dropped]
    for key in dropped:
        if value[key].new:
            raise ConfigError(
                f"{where}.{key} must be an entry of the run file, {listed(map(str, kept))}, to be dropped by null.{nearest(str(key), kept)}"
            )
    if dropped and not kept:
        raise ConfigError(f"{where} must keep an entry, but null drops the last one, {dropped[-1]}. Give another one beside it.")
    return kept


def _key(key: object, where: str) -> str:
    if not isinstance(key, str):
        raise ConfigError(f"{where} must have names as keys; got {shown(key)}. Put it in quotes.")
    return key


def _implied(value: Mapping[str, Any], default: Any, slots: Sequence[Any], where: str) -> Part | None:
    """Part of a mapping without class_path: the default, or the only concrete class of the slot."""
    if "class_path" in value:
        return None
    if isinstance(part := described(default, where), Part) and part.how == "call":
        return part
    if len(slots) == 1 and list(parts.candidates(slots).values()) == slots:
        return Part(where, parts.import_path(slots[0], ""), slots[0])
    return None


def _takes(instead: Mapping[str, Any], parameter: Parameter, slots: Sequence[Any], where: str) -> bool:
    """Check whether a mapping without class_path there holds the arguments of a part, and not parts by name."""
    return bool(parameter.usual) or _implied(instead, parameter.default, slots, where) is not None


def _owned(value: Mapping[str, Any], parameter: Parameter, slots: Sequence[Any], where: str) -> Mapping[str, Any]:
    """Name the class of inherited arguments where the file leaves the class out."""
    arguments = value.get("init_args")
    if not isinstance(arguments, Mapping) or not any(isinstance(entry, Inherited) and entry.of is None for entry in arguments.values()):
        return value
    implied = _implied({}, parameter.default, slots, where)
    of = parameter.usual or ("" if implied is None else implied.name)
    owned = {
        name: Inherited(entry.value, of) if isinstance(entry, Inherited) and entry.of is None else entry
        for name, entry in arguments.items()
    }
    return {**value, "init_args": owned}


def _part(value: Mapping[str, Any], slots: Sequence[Any], where: str, implied: Part | None, expected: str) -> Part:
    if implied is not None and not set(value) & set(_KEYS):
        value = {"init_args": value}
    if strange := [key for key in value if key not in _KEYS]:
        guess = nearest(str(strange[0]), _KEYS)
        raise ConfigError(f"{where}.{strange[0]} must stand under init_args: only class_path and init_args are allowed here.{guess}")
    given = value.get("init_args")
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where}: init_args must be a mapping from parameters to values; got {shown(given)}")
    if implied is not None:
        target, name, how, slot = implied.target, implied.name, implied.how, next(slot for slot in slots if accepts(slot, implied.target))
        given = {**implied.arguments, **given}
    else:
        target, name, how, slot = _found(value["class_path"], slots, where, expected)
    if how == "itself" or (how == "partial" and inspect.isroutine(target) and not given):
        if given:
            raise ConfigError(f"{where}: {name} is not called, so it takes no init_args; got {listed(map(str, given), 'and')}")
        return Part(where, name, target, how="itself")
    return _with_arguments(Part(where, name, target, given, how), slot)


def _found(path: Any, slots: Sequence[Any], where: str, expected: str) -> tuple[Any, str, Any, Any]:
    path = path.value if isinstance(path, Argument) else path
    if not isinstance(path, str):
        raise ConfigError(f"{where} must be {expected}, named by class_path; got {shown(path)}")
    try:
        target = parts.find(path, slots)
    except LookupError as error:
        reason = str(error)
        end = f": {reason}" if reason else f".{parts.suggestion(path, slots)}"
        raise ConfigError(f"{where} must be {expected}; got {path!r}{end}") from error
    for slot in slots:
        if how := accepts(slot, target):
            return target, parts.import_path(target, path), how, slot
    if inspect.isclass(target):
        abstract = isinstance(target, ABCMeta) and target.__abstractmethods__
        lacking = f"abstract: it lacks {listed(sorted(abstract), 'and')}" if abstract else "none"
        why = f"the class {path!r} is {lacking}"
    elif inspect.isroutine(target):
        why = f"the function {path!r} is not declared to return one"
    else:
        why = f"{path!r} is an object of class {type(target).__name__}"
    raise ConfigError(f"{where} must be {expected}; {why}.{parts.suggestion(path, slots)}")


def _with_arguments(part: Part, slot: Any) -> Part:
    """Resolve all arguments of a part, including defaults."""
    where, given = part.where, dict(part.arguments)
    known = parameters(part.target, supplied(slot) if part.how == "partial" else 0)
    title = part.name.rpartition(".")[2] if inspect.isclass(part.target) else ".".join(part.name.split(".")[-2:])
    linked: tuple[str, ...] = ("policy",) if inspect.isclass(slot) and issubclass(slot, Objective) else ()
    if known is None:
        return attrs.evolve(part, arguments={name: _unwrapped(value) for name, value in given.items()}, linked=linked)
    if missing := [name for name in linked if name not in known]:
        raise ConfigError(
            f"{where}: {title} must have a parameter {missing[0]!r} for the weights being aligned; it has none. Name a function of yours "
            f"with such a parameter, which makes it: def mine({missing[0]}: Policy) -> Objective"
        )
    linked += tuple(name for name, parameter in known.items() if Sharding in alternatives(parameter.hint))
    for name in linked:
        if name in given:
            raise ConfigError(f"{where}.{name} must be left out: it is the run's own {name}. Remove it.")
        known.pop(name)
    given = _without_dropped(given, part, slot, title)
    for name in given:
        if name not in known:
            raise ConfigError(f"{where}.{name} is no parameter of {title}, which takes {listed(known, 'and')}.{nearest(str(name), known)}")
    arguments = {}
    for name, parameter in known.items():
        place = f"{where}.{name}"
        if name in given:
            arguments[name] = resolve(given[name], parameter, place)
        elif parameter.default is MISSING:
            raise ConfigError(f"{place} is missing: {title} needs it ({words(parameter.hint)}).{_not_handed_down(parameter.hint, place)}")
        elif (default := described(parameter.default, place)) is not MISSING:
            arguments[name] = default
    return attrs.evolve(part, arguments=arguments, linked=linked)


def _not_handed_down(hint: Any, place: str) -> str:
    """Advice for a part inside the objective that lacks a policy."""
    if not place.startswith("objective.") or Policy not in alternatives(hint):
        return ""
    return (
        " Only the objective itself is given the run's policy: let it make this part, or name a function of yours that makes the objective."
    )


def _without_dropped(given: dict[str, Any], part: Part, slot: Any, title: str) -> dict[str, Any]:
    """Drop arguments of another class than the one to build, with a warning: a number of the same name may mean something else."""
    dropped = {name: value.of or "" for name, value in given.items() if isinstance(value, Inherited) and not _is_same(value.of, part, slot)}
    if dropped:
        before = _title(next(iter(dropped.values())))
        warnings.warn(
            f"{part.where}: {listed(dropped, 'and')}{' of ' * bool(before)}{before} dropped; {title} is another class and takes its own "
            "defaults where the command line gives nothing",
            ConfigWarning,
            stacklevel=2,
        )
    kept = {name: value for name, value in given.items() if name not in dropped}
    return {name: value.value if isinstance(value, Inherited) else value for name, value in kept.items()}


def _is_same(name: str | None, part: Part, slot: Any) -> bool:
    try:
        return bool(parts.find(name or "", (slot,)) == part.target)
    except LookupError:
        return False


def _title(path: str) -> str:
    """Name of a class, or of a class and its method, without its modules."""
    names = path.replace(":", ".").split(".")
    return ".".join(names[next((place for place, name in enumerate(names) if name[:1].isupper()), -1) :])
