"""Writes tests/data/public_api.txt, what others may rely on: `python book/public_names.py`, or `make reference`."""

import ast
import enum
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

FILE = Path(__file__).parents[1] / "tests" / "data" / "public_api.txt"

MODULES = (
    "diffalign",
    "diffalign.core",
    "diffalign.policies",
    "diffalign.samplers",
    "diffalign.objectives",
    "diffalign.rewards",
    "diffalign.prompts",
    "diffalign.evaluation",
    "diffalign.runs",
    "diffalign.testing",
    "diffalign.voting",
)


USERS, AUTHORS = "For users", "For authors of parts"


def listing() -> str:
    """One line for each public name, with the names of its parameters; one for each public method and computed attribute of a class."""
    return "".join(f"{line}\n" for module in MODULES for line in _of(module))


def kinds(module: ModuleType) -> dict[str, list[str]]:
    """The public names of a module: those for users, and, where a second list is added to its `__all__`, that one for authors of parts."""
    names = _names(module)
    additions = [node.value for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.AugAssign)]
    authors = {name for value in additions for name in ast.literal_eval(value)}
    parted = {USERS: [name for name in names if name not in authors], AUTHORS: [name for name in names if name in authors]}
    return {kind: members for kind, members in parted.items() if members}


def _of(name: str) -> Iterator[str]:
    module = importlib.import_module(name)
    parted = kinds(module)
    for kind, names in parted.items():
        yield f"# {name}{f': {kind.lower()}' if len(parted) > 1 else ''}"
        for public in sorted(names):
            target = getattr(module, public)
            yield f"{name}.{public}{_signature(target)}"
            if inspect.isclass(target) and name != "diffalign":  # there again under their rooms
                yield from sorted(f"{name}.{public}.{line}" for line in _members(target))


def _names(module: Any) -> list[str]:
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [
        name for name, value in vars(module).items() if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
    ]


def _members(target: type) -> Iterator[str]:
    """What the class itself defines: inherited methods stand at the class that they come from, fields in the constructor's line."""
    for name, value in vars(target).items():
        if name.startswith("_") and name != "__call__":
            continue
        if isinstance(value, property):
            yield name
        elif inspect.isroutine(getattr(target, name, None)):
            yield f"{name}{_signature(getattr(target, name))}"
    yield from (field.name for field in getattr(target, "__attrs_attrs__", ()) if not field.init and not field.name.startswith("_"))


def _signature(target: Any) -> str:
    if not callable(target) or (inspect.isclass(target) and issubclass(target, BaseException | enum.Enum)):
        return ""
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # a type alias, a protocol
        return ""
    return f"({', '.join(parameter.name for parameter in parameters if parameter.name != 'self')})"


if __name__ == "__main__":
    FILE.write_text(listing())
