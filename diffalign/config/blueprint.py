"""What a run is made of before it is built: parts with their classes and arguments, and plain values."""

import enum
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import attrs

from .errors import refused
from .parts import import_path
from .signature import MISSING


@attrs.frozen
class Part:
    """Something that is imported, and mostly called.

    Args:
        where: its place in the configuration
        name: the path that imports it
        target: what that gives
        arguments: by name; values and further parts
        how: "call" gives the part, "partial" a factory that is called later, "itself" stands as it is
        linked: arguments that the run gives: what only exists once other parts are built, and how it spreads weights
    """

    where: str
    name: str
    target: Any
    arguments: Mapping[str, Any] = attrs.field(factory=dict)
    how: Literal["call", "partial", "itself"] = "call"
    linked: tuple[str, ...] = ()


def described(default: Any, where: str) -> Any:
    """A default value as it would stand in a run file; MISSING where it could not be written."""
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
    """A class or function whose leading arguments come later: an optimizer waits for its parameters.

    Args:
        where: its place in the configuration
        target: what is called
        arguments: by name
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
    """The objects of a resolved value.

    Args:
        node: plain values and parts
        links: what linked arguments stand for; one that is not among them keeps its default

    Raises:
        ConfigError: a constructor refused; the message begins with the part's place.
    """
    if isinstance(node, Mapping):
        return {key: build(value, links) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(build(value, links) for value in node)
    if not isinstance(node, Part):
        return node
    if node.how == "itself":
        return node.target
    arguments = {name: build(value, links) for name, value in node.arguments.items()}
    if node.how == "partial":
        return Factory(node.where, node.target, arguments)
    try:
        return node.target(**arguments, **{name: links[name] for name in node.linked if name in links})
    except (ValueError, TypeError, LookupError, OSError, ImportError) as error:
        raise refused(node.where, error) from error


def plain(node: Any) -> Any:
    """A resolved value as a run file writes it."""
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
