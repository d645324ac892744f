"""Overrides: the command line replaces values of a run file, as in --sampler.plan.eta 0.9."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs

from ..core import ConfigError
from .files import read_yaml


@attrs.frozen
class Argument:
    """Value of the command line. It is kept in two forms, because 7 may be a number or the name of a folder.

    Args:
        text: the typed text
        value: the text read as YAML
        instead: mapping without class_path that it replaces: arguments, if a part belongs there
        new: True if the run file has nothing at its place
        unread: error of the parser, where the text begins as a mapping or a list and is no YAML; only a place for text takes it
    """

    text: str
    value: Any
    instead: Mapping[str, Any] | None = None
    new: bool = False
    unread: ConfigError | None = None

    def require_read(self) -> None:
        """Refuse a text that was meant as a mapping or a list, and is not well written.

        Raises:
            ConfigError: it is one; the message is the parser's.
        """
        if self.unread is not None:
            raise self.unread


@attrs.frozen
class Inherited:
    """Argument of a run file for a class whose place the command line gives to a class.

    Args:
        value: value in the run file
        of: class of the argument, as the file names it; None where the file leaves the class out
    """

    value: Any
    of: str | None


def override(content: Mapping[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
    """Replace keys of a run file by those of the command line.

    Args:
        content: keys of a run file; not changed
        arguments: --dotted.path value, or --dotted.path=value; `init_args` need not be written

    Raises:
        ConfigError: an argument does not have this form.
    """
    result: dict[str, Any] = _copy(content)
    for path, text in _pairs(arguments):
        _assign(result, path.split("."), _argument(text, f"--{path}"), path)
    return result


def _copy(value: Any) -> Any:
    """Copy a value, so that two places with the same YAML alias become independent."""
    if isinstance(value, Mapping):
        return {key: _copy(entry) for key, entry in value.items()}
    return [_copy(entry) for entry in value] if isinstance(value, list) else value


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise ConfigError(f"the command line must override by --key value; got {word!r}")
        path, equals, text = word[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--{path} must be followed by a value; got {rest[0] if rest else 'nothing'}")
            text = rest.pop(0)
        if not all(path.split(".")):
            raise ConfigError(f"the command line must override by --key value with a dotted key; got {word!r}")
        yield path, text


def _argument(text: str, place: str) -> Argument:
    try:
        return Argument(text, read_yaml(text, place))
    except ConfigError as error:  # a prompt or a path need not be YAML
        return Argument(text, text, unread=error if text.lstrip().startswith(("{", "[")) else None)


def _assign(node: Any, names: Sequence[str], value: Argument, path: str) -> None:
    """Put a value at a path inside a container, and make the containers on the way."""
    node = _inside(node, names[0])
    name: Any = names[0]
    if isinstance(node, list):
        if not name.isdecimal() or int(name) >= len(node):
            raise ConfigError(f"--{path}: {name!r} must be an index into a list of {len(node)}, from 0")
        name = int(name)
    there = node[name] if isinstance(node, list) else node.get(name)
    if isinstance(there, Argument) and there.instead is not None:  # the command line comes here a second time
        there = there.instead if len(names) == 1 else {"class_path": there.text, "init_args": inherited(there.instead, None)}
    there = there.value if isinstance(there, Inherited | Argument) else there
    if len(names) > 1:
        if isinstance(there, str):  # a class given only by its name
            there = {"class_path": there}
        if not isinstance(there, dict | list):
            there = {}
        node[name] = there
        if names[1:] == ["class_path"]:
            node[name] = _other_class(there, value)
        else:
            _assign(there, names[1:], value, path)
    elif isinstance(there, dict) and isinstance(value.value, str):
        node[name] = _other_class(there, value)
    else:
        node[name] = attrs.evolve(value, new=isinstance(node, dict) and name not in node)


def _inside(node: Any, name: str) -> Any:
    """Container that holds the arguments: `init_args` if the node is a part, else the node."""
    if not isinstance(node, dict) or name in ("class_path", "init_args") or not {"class_path", "init_args"} & node.keys():
        return node
    if not isinstance(node.get("init_args"), dict):
        node["init_args"] = {}
    return node["init_args"]


def _other_class(there: Any, value: Argument) -> Any:
    """Put a class in the place of another. Only the same class takes over the other's arguments: see `resolution`.

    What is a part and what a mapping is known where types are.
    """
    if isinstance(there, dict) and not {"class_path", "init_args"} & there.keys():
        return attrs.evolve(value, instead=there)
    value.require_read()
    arguments, before = (there.get("init_args"), there.get("class_path")) if isinstance(there, dict) else (None, None)
    return {"class_path": value.text, "init_args": inherited(arguments or {}, before if isinstance(before, str) else None)}


def inherited(arguments: Mapping[str, Any], of: str | None) -> dict[str, Any]:
    """Mark the arguments that the run file gives to a class of this name, because no other class may take them."""
    return {name: entry if isinstance(entry, Inherited | Argument) else Inherited(entry, of) for name, entry in arguments.items()}
