"""Blueprint of a run before it is built: parts with their classes and arguments, and plain values."""

import enum
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import attrs

from .errors import Faults, refused
from .parts import import_path
from .signature import MISSING


@attrs.frozen
class Part:
    """Part of a run: an object that is imported and, mostly, called.

    Args:
        where: place in the configuration
        name: import path
        target: imported object
        arguments: values and further parts, by name
        how: "call" calls the target, "partial" makes a factory that is called later, "itself" takes the target as it is
        linked: arguments that the run gives, because they exist only once other parts are built, or because they shard weights
    """

    where: str
    name: str
    target: Any
    arguments: Mapping[str, Any] = attrs.field(factory=dict)
    how: Literal["call", "partial", "itself"] = "call"
    linked: tuple[str, ...] = ()


def described(default: Any, where: str) -> Any:
    """Convert a default value to the form of a run file; MISSING if it cannot be written."""
    if default is None or isinstance(default, bool | int | float | str):
        return default
    if isinstance(default, Path):
        return default
    if isinstance(default, list | tuple):
        items = [described(item, f"{where}.{place}") for place, item in enumerate(default)]
        return MISSING if any(item is MISSING for item in items) else type(default)(items)
    if isinstance(default, Mapping):
        entries = {key: described(item, f"{where}.{key}") for key, item in default.items()}
        return MISSING if any(item is MISSING for item in entries.values()) else entries
    if attrs.has(type(default)):
        fields = {field.alias: getattr(default, field.name) for field in attrs.fields(type(default)) if field.init}
        arguments = {name: described(value, f"{where}.{name}") for name, value in fields.items()}
        kept = {name: value for name, value in arguments.items() if value is not MISSING}
        return Part(where, import_path(type(default), ""), type(default), kept)
    return MISSING


@attrs.frozen
class Factory:
    """Factory for a class or function whose first arguments come later; an optimizer, for example, waits for its parameters.

    Args:
        where: place in the configuration
        target: class or function that is called
        arguments: arguments by name
    """

    where: str
    target: Any
    arguments: Mapping[str, Any]

    def __call__(self, *leading: Any) -> Any:
        try:
            return self.target(*leading, **self.arguments)
        except (ValueError, TypeError) as error:
            raise refused(self.where, error) from error


def build(node: Any, links: Mapping[str, Any]) -> Any:
    """Build the objects of a resolved value.

    Args:
        node: plain values and parts
        links: values of linked arguments; a linked argument without a value keeps its default

    Raises:
        ConfigError: constructors raised errors; each message begins with the part's place. A part is not built if one of its arguments
            could not be; all its arguments are tried.
    """
    if isinstance(node, Mapping):
        return _each(node, links)
    if isinstance(node, list | tuple):
        return type(node)(_each(dict(enumerate(node)), links).values())
    if not isinstance(node, Part):
        return node
    if node.how == "itself":
        return node.target
    arguments = _each(node.arguments, links)
    if node.how == "partial":
        return Factory(node.where, node.target, arguments)
    try:
        return node.target(**arguments, **{name: links[name] for name in node.linked if name in links})
    except (ValueError, TypeError, LookupError, OSError, ImportError) as error:
        raise refused(node.where, error) from error


def _each(nodes: Mapping[Any, Any], links: Mapping[str, Any]) -> dict[Any, Any]:
    made, faults = {}, Faults()
    for key, node in nodes.items():
        with faults:
            made[key] = build(node, links)
    faults.raised()
    return made


def plain(node: Any) -> Any:
    """Convert a resolved value to the form of a run file."""
    if isinstance(node, Part):
        if node.how == "itself":
            return node.name
        return {"class_path": node.name, "init_args": plain(node.arguments)} if node.arguments else {"class_path": node.name}
    if isinstance(node, Mapping):
        return {key: plain(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [plain(value) for value in node]
    if isinstance(node, enum.Enum):
        return node.name
    kind = next((kind for kind in (bool, int, float, str) if isinstance(node, kind)), None)
    return node if node is None else (kind or str)(node)  # restricted numbers, paths, dates: their plain kind, which is read back
