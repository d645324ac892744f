"""Whole paths of the files that a run names, so that it can be read from any folder."""

import os
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import attrs

from ..core import Prompt
from ..embedded import WORLDS
from ..prompts import Prompts
from .blueprint import Part

_LONGEST_PATH = 4096
_PLACES = ("path", "start", "single_file", "weights", "model", "folder")
"""Arguments whose value may be the name of a file or folder without any slash."""


@runtime_checkable
class Writes(Protocol):
    """Class of parts that write files.

    Attributes:
        written: arguments that name a file which the run writes, where the command is given: one beside the run file is another run's
    """

    written: tuple[str, ...]


def anchored(node: Any, beside: Path | None, named: bool = False) -> Any:
    """Make names of files absolute in a resolved value: those of its parts, and in their mappings and lists.

    A text names a file if it looks like a path, or its argument is called like one, and there is one: where the command is given, or
    else beside the run file. A `Path` names one whatever it looks like. Texts of `Prompts` are prompts.

    Args:
        node: plain values and parts
        beside: folder of the run file; None if there is none
        named: whether the argument that holds the value is called like a place
    """
    if isinstance(node, Part):
        if node.target is Prompts:
            return node
        written = node.target.written if isinstance(node.target, Writes) else ()
        return attrs.evolve(
            node,
            arguments={
                name: anchored(value, None if name in written else beside, name in _PLACES) for name, value in node.arguments.items()
            },
        )
    if isinstance(node, dict):
        return {name: anchored(value, beside, named) for name, value in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(anchored(value, beside, named) for value in node)
    if isinstance(node, Path):
        return Path(_whole(str(node), beside))
    if not isinstance(node, str) or isinstance(node, Prompt) or not (_is_path(node) or (named and node not in WORLDS)):
        return node
    return _whole(node, beside)


def _whole(name: str, beside: Path | None) -> str:
    """The whole path of a file or folder; the name as it is if there is none."""
    places = [Path(name), *([] if beside is None else [beside / name])]
    return next((str(place.absolute()) for place in places if os.path.exists(place)), name)  # Path.exists raises at a name that is too long


def _is_path(text: str) -> bool:
    shipped = text.partition("/")[0] in WORLDS and not Path(text).suffix
    return len(text) < _LONGEST_PATH and "\0" not in text and not shipped and ("/" in text or bool(Path(text).suffix))
