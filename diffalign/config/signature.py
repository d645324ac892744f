"""Signatures of constructors: their parameters, and the values that each place of a configuration allows."""

import collections.abc
import enum
import functools
import inspect
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Union

import attrs
import jsonargparse
from torch import Tensor

from .errors import listed

MISSING: Any = inspect.Parameter.empty
"""Marker for a parameter without a default."""

_FACTORY: Any = attrs.Factory  # a class at run time, a function to type checkers

_ITS_OWN: Any = object()
"""Marker for a default that only the constructor knows."""

_PLAIN = (str, int, float, complex, bytes, bool, list, dict, set, frozenset, tuple, type, enum.Enum, os.PathLike, Tensor)


@attrs.frozen
class Parameter:
    """Parameter of a constructor.

    Args:
        name: name in the configuration
        hint: type; Any if none is declared
        default: value if it is left out; `MISSING` if it is required
        usual: class that a mapping of arguments means if it names none, or each of them in a mapping of parts; "" if one must be named
    """

    name: str
    hint: Any
    default: Any = MISSING
    usual: str = ""


def parameters(target: Callable[..., Any], skip: int = 0) -> dict[str, Parameter] | None:
    """Read the parameters of a class, a classmethod or a function, by name.

    Args:
        target: class, classmethod or function
        skip: number of leading parameters that somebody else supplies

    Returns:
        The parameters; None if the signature does not show them (it is written in C, or its **kwargs cannot be followed).
    """
    try:
        found = list(inspect.signature(target).parameters.values())[skip:]
    except (TypeError, ValueError):
        return None
    hints = _hints(target)
    fields = _fields(target)
    known = {}
    for entry in found:
        if entry.kind in (entry.VAR_POSITIONAL, entry.VAR_KEYWORD):
            continue
        default, hint = entry.default, hints.get(entry.name, Any)
        if entry.name in fields:
            field = fields[entry.name]
            hint = hints.get(entry.name, hints.get(field.name, Any))
            if isinstance(field.default, _FACTORY):
                default = field.default.factory() if not field.default.takes_self else None
        known[entry.name] = Parameter(entry.name, hint, default)
    if any(entry.kind is entry.VAR_KEYWORD for entry in found):
        behind = _behind_kwargs(target)
        if not behind:
            return None
        known.update({name: Parameter(name, Any, _ITS_OWN) for name in behind if name not in known})
    return known


def _fields(target: Any) -> dict[str, Any]:
    """Fields of an attrs class by the names of its parameters."""
    return {field.alias: field for field in getattr(target, "__attrs_attrs__", ())} if inspect.isclass(target) else {}


def _hints(target: Any) -> dict[str, Any]:
    """Resolved annotations. An attrs converter without annotation hides a parameter's type, so the class's fields are read too."""
    sources = [target, target.__init__] if inspect.isclass(target) else [target]
    hints: dict[str, Any] = {}
    for source in sources:
        try:
            hints.update(typing.get_type_hints(source, include_extras=True))
        except (NameError, TypeError, AttributeError):  # a name that only type checkers see must not hide the other annotations
            hints.update(_one_by_one(source))
    return hints


def _one_by_one(source: Any) -> dict[str, Any]:
    hints: dict[str, Any] = {}
    for name, annotation in getattr(source, "__annotations__", {}).items():
        alone = type("Alone", (), {"__annotations__": {name: annotation}, "__module__": source.__module__})
        try:
            hints.update(typing.get_type_hints(alone, include_extras=True))
        except (NameError, TypeError, AttributeError):
            continue
    return hints


def _behind_kwargs(target: Any) -> list[str]:
    """Names of the parameters behind **kwargs, which jsonargparse reads from the source code; empty if it finds none."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    try:
        if inspect.isclass(target):
            return list(parser.add_class_arguments(target, fail_untyped=False))
        return list(parser.add_function_arguments(target, fail_untyped=False))
    except Exception:  # it reads foreign source code, where anything may fail; then nothing is known
        return []


def alternatives(hint: Any) -> tuple[Any, ...]:
    """Members of a union; for another type, the type itself."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return tuple(member for part in typing.get_args(hint) for member in alternatives(part))
    if typing.get_origin(hint) is Annotated and is_slot(typing.get_args(hint)[0]):
        return alternatives(typing.get_args(hint)[0])
    return (hint,)


def is_slot(member: Any) -> bool:
    """True if the type is a place for a part: a class of which an object is built, or a callable. All else is a plain value."""
    if is_callable(member):
        return True
    if not inspect.isclass(member) or issubclass(member, _PLAIN) or member in (object, type(None)):
        return False
    return member.__module__.partition(".")[0] not in sys.stdlib_module_names and typing.get_origin(member) is None


def is_callable(member: Any) -> bool:
    """True if the type is Callable."""
    return member is collections.abc.Callable or typing.get_origin(member) is collections.abc.Callable


def item_of(member: Any) -> Any:
    """Type of the items of a sequence of any length; else MISSING."""
    arguments = typing.get_args(member)
    origin = typing.get_origin(member)
    if origin in (list, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection):
        return arguments[0]
    return arguments[0] if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis else MISSING


def value_of(member: Any) -> Any:
    """Type of the values of a mapping with text keys; else MISSING."""
    if typing.get_origin(member) in (dict, collections.abc.Mapping, collections.abc.MutableMapping):
        key, value = typing.get_args(member)
        return value if key is str else MISSING
    return MISSING


def accepts(slot: Any, target: Any) -> Literal["call", "partial", "itself"] | None:
    """Decide how an imported object fills a slot.

    Returns:
        "call": calling it gives the part. "partial": the slot needs a factory, so some arguments come later. "itself": it is the part.
        None: it does not fit.
    """
    if getattr(target, "_is_protocol", False):
        return None
    if is_callable(slot):
        return _serves(slot, target)
    if inspect.isclass(target):
        return "call" if _is_a(target, slot) and not inspect.isabstract(target) else None
    if inspect.isroutine(target):
        made = _hints(target).get("return")
        owner = getattr(target, "__self__", None)
        made = owner if made is typing.Self and inspect.isclass(owner) else made
        return "call" if inspect.isclass(made) and _is_a(made, slot) else None
    return "itself" if _is_a(type(target), slot) else None


def _serves(slot: Any, target: Any) -> Literal["call", "partial", "itself"] | None:
    """Decide how an object fills a slot for a callable: as a factory that returns a part, or as a function or callable object."""
    returns = (typing.get_args(slot) or (None, None))[1]
    factory = inspect.isclass(returns) and is_slot(returns)
    if inspect.isclass(target):
        if factory and issubclass(target, returns):
            return "partial"
        called = next((vars(base)["__call__"] for base in target.__mro__ if "__call__" in vars(base)), None)
        return "call" if called is not None and (not factory or _makes(called, returns, False)) else None
    if inspect.isroutine(target):
        return "partial" if not factory or _makes(target, returns, True) else None
    return "itself" if callable(target) else None


def _makes(function: Any, returns: type, undeclared: bool) -> bool:
    made = _hints(function).get("return")
    return issubclass(made, returns) if inspect.isclass(made) else undeclared


def _is_a(target: type, slot: type) -> bool:
    if not getattr(slot, "_is_protocol", False):
        return issubclass(target, slot)
    wanted = {name: method for name, method in vars(slot).items() if inspect.isfunction(method) and not name.startswith("_")}
    return bool(wanted) and all(_takes_as_much(getattr(target, name, None), method) for name, method in wanted.items())


def _takes_as_much(method: Any, like: Any) -> bool:
    """True if a method can be called like another one, as far as its signature and its types show."""
    try:
        wanted = list(inspect.signature(like).parameters)
        given = inspect.signature(method)
        given.bind(*wanted)
    except (TypeError, ValueError):
        return False
    mine, its = _hints(method), _hints(like)
    names = [name for name, entry in given.parameters.items() if entry.kind in (entry.POSITIONAL_ONLY, entry.POSITIONAL_OR_KEYWORD)]
    return not any(_strangers(mine.get(name), its.get(like_name)) for name, like_name in zip(names, wanted, strict=False))


def _strangers(one: Any, other: Any) -> bool:
    """True for two classes of which neither is a subclass of the other."""
    return inspect.isclass(one) and inspect.isclass(other) and not (issubclass(one, other) or issubclass(other, one))


def supplied(slot: Any) -> int:
    """Number of leading arguments that the caller of a factory supplies."""
    arguments = typing.get_args(slot)
    return len(arguments[0]) if arguments and isinstance(arguments[0], Sequence) else 0


@functools.cache
def _checker(hint: Any) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    return parser


def check(value: Any, members: Sequence[Any]) -> Any:
    """Check a plain value, and convert it if that loses nothing (3 for a float).

    Args:
        value: value from the file
        members: allowed types

    Raises:
        TypeError: the value has another type.
    """
    if value is None:
        if type(None) in members:
            return None
        raise TypeError
    if Any in members or object in members:
        return value
    rest = tuple(member for member in members if member is not type(None) and not is_slot(member) and not _unwritable(member, members))
    if not rest:
        raise TypeError
    try:
        checker = _checker(Union[rest])  # noqa: UP007  a tuple of types has no other form
    except (ValueError, TypeError):  # jsonargparse has no rule for this type; the constructor will check it
        return value
    try:
        return checker.parse_object({"value": value})["value"]
    except jsonargparse.ArgumentError as error:
        raise TypeError(str(error)) from error


def _unwritable(member: Any, members: Sequence[Any]) -> bool:
    """True for tensors, and for a subclass of str beside str itself, which the constructor makes from the text."""
    return inspect.isclass(member) and (issubclass(member, Tensor) or (issubclass(member, str) and member is not str and str in members))


_WORDS: Mapping[Any, str] = {
    int: "an integer",
    float: "a number",
    str: "text",
    bool: "true or false",
    type(None): "null",
    list: "a list",
    dict: "a mapping",
    Any: "anything",
    object: "anything",
}


def words(hint: Any) -> str:
    """Describe a type in words, for messages."""
    return listed(dict.fromkeys(map(_word, alternatives(hint))))


def _word(member: Any) -> str:
    if word := next((word for kind, word in _WORDS.items() if kind is member), ""):
        return word
    if typing.get_origin(member) is Literal:
        return listed(map(repr, typing.get_args(member)))
    if inspect.isclass(member) and issubclass(member, enum.Enum):  # its members are written by their names
        return listed(map(repr, member.__members__))
    if is_callable(member):
        returns = (typing.get_args(member) or (None, None))[1]
        return f"the class of an {returns.__name__}" if inspect.isclass(returns) and is_slot(returns) else "a function"
    if (item := item_of(member)) is not MISSING:
        return f"a list (each {words(item)})"
    if (value := value_of(member)) is not MISSING:
        return f"a mapping (each {words(value)})"
    if inspect.isclass(member) and not typing.get_args(member):
        if issubclass(member, int | float):  # restricted numbers of jsonargparse describe their limits in the docstring
            return inspect.getdoc(member) or member.__name__
        return "a path" if issubclass(member, os.PathLike) else f"{'an' if member.__name__[0] in 'AEIOU' else 'a'} {member.__name__}"
    return str(member).replace("typing.", "").replace("collections.abc.", "")
