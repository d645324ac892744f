"""The programs: every file of a room that defines `main`. Listing them imports none."""

import ast
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path

import attrs

HERE = Path(__file__).parent
ROOMS = {"cost": "cost", "study": "study", "break": "breaking"}
"""What is typed -> the folder, since a module cannot be called `break`."""


@attrs.frozen
class Program:
    """One benchmark.

    Args:
        room, name: as they are typed
        told: the docstring of its file; the first line is what the list shows
    """

    room: str
    name: str
    told: str

    @property
    def summary(self) -> str:
        return self.told.partition("\n")[0]

    def main(self) -> Callable[..., int | None]:
        """Imports the file. `main` ends with an exit status; None is 0."""
        found: Callable[..., int | None] = importlib.import_module(f"benchmarks.{ROOMS[self.room]}.{self.name}").main
        return found


def summary_of(room: str) -> str:
    return _told(ast.parse((HERE / ROOMS[room] / "__init__.py").read_text()))


def programs_of(room: str) -> Mapping[str, Program]:
    """By name, in the order of the alphabet."""
    found = {}
    for file in sorted((HERE / ROOMS[room]).glob("*.py")):
        tree = ast.parse(file.read_text())
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            found[file.stem] = Program(room, file.stem, _told(tree))
    return found


def _told(tree: ast.Module) -> str:
    return ast.get_docstring(tree) or ""
