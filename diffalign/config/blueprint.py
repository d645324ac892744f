"""Blueprint of a run before it is built: parts with their classes and arguments, and plain values."""

import enum
import functools
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import attrs

from ..core import CheckpointError, ConfigError
from ..core.words import allowed_word
from .errors import listed, refused
from .files import maker
from .parts import import_path
from .signature import MISSING


@runtime_checkable
class Found(Protocol):
    """Class with a constructor for files, which can look for them first."""

    def require_found(self, **arguments: Any) -> None:
        """Refuse files that are not within reach. Takes those arguments of the constructor that name files, and loads no weights.

        Raises:
            ValueError: a file is missing.
        """


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
    how: Literal["call", "partial", "itself"] = attrs.field(default="call", validator=allowed_word)
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


class Factory:
    """Factory for a class or function whose first arguments come later; an optimizer, for example, waits for its parameters.

    It has the name of what it calls, and the signature of what is left to give, so that a reward is named and checked as the function is.

    Args:
        where: place in the configuration
        target: class or function that is called
        arguments: arguments by name
    """

    def __init__(self, where: str, target: Any, arguments: Mapping[str, Any]) -> None:
        self.where, self.target, self.arguments = where, target, arguments
        self.__name__ = getattr(target, "__name__", type(target).__name__)
        try:
            self.__signature__ = inspect.signature(functools.partial(target, **arguments))
        except ValueError:  # written in C: its call will tell
            self.__signature__ = inspect.signature(self)

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
        ConfigError: a constructor raised an error; the message begins with the part's place.
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
    except (ValueError, TypeError, LookupError, OSError, ImportError, CheckpointError) as error:
        raise _told(refused(node.where, error, node.name), arguments) from error


def _told(error: ConfigError, arguments: Mapping[str, Any]) -> ConfigError:
    """Add which built-in run makes a folder that an argument names and that is not there; see `maker`."""
    makers = dict.fromkeys(maker(value) for value in arguments.values() if isinstance(value, str))
    runs = [f"`diffalign train {run}`" for run in makers if run]
    return ConfigError(f"{str(error).rstrip('.')}. Run {listed(runs, 'and')} first.") if runs else error


def build_all(nodes: Mapping[str, Any], errors: list[ConfigError]) -> dict[str, Any]:
    """Build resolved values that do not need each other. One that cannot be built does not hide the next.

    Args:
        nodes: values by key; of a mapping, each entry is built by itself
        errors: gets the errors

    Returns:
        What could be built.
    """
    made: dict[str, Any] = {}
    for key, node in nodes.items():
        try:
            made[key] = build_all(node, errors) if isinstance(node, Mapping) else build(node, {})
        except ConfigError as error:
            errors.append(error)
    return made


def require_found(node: Any, errors: list[ConfigError]) -> None:
    """Look for the files of the parts in a resolved value, without loading them; see `Found`.

    Args:
        node: plain values and parts
        errors: gets the errors
    """
    for inner in node.arguments.values() if isinstance(node, Part) else ():
        require_found(inner, errors)
    owner = node.target.__self__ if isinstance(node, Part) and inspect.ismethod(node.target) else None
    if isinstance(node, Part) and isinstance(owner, Found):
        taken = inspect.signature(owner.require_found).parameters
        given = {name: value for name, value in node.arguments.items() if name in taken}
        try:
            owner.require_found(**given)
        except (ValueError, OSError) as error:
            errors.append(_told(refused(node.where, error), given))


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
