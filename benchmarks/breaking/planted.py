"""Planted faults: what they are, and how they get into a copy of the package."""

import importlib.util
import shutil
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import attrs

ROOT = Path(__file__).parents[2]
LISTS = Path(__file__).parent / "faults"
COPIED = ("diffalign", "tests", "examples", "benchmarks", "docs")


@attrs.frozen
class Fault:
    """A mistake that somebody could make.

    Args:
        name, kind: a few words
        file: below the root of the repository
        old, new: text of the file, of which `old` is there once, and what takes its place
        tests: files that may see it, nearest first
        contracts: parts whose contract may see it, as `pytest --diffalign` takes them
        equivalent: why nothing can see it; empty where something should
    """

    name: str
    kind: str
    file: str
    old: str
    new: str
    tests: Sequence[str]
    contracts: Sequence[str] = ()
    equivalent: str = ""

    def planted(self, source: str) -> str:
        """The file's text with the fault in it.

        Raises:
            ValueError: `old` is not there exactly once, so the list is older than the file.
        """
        found = source.count(self.old)
        if found != 1:
            raise ValueError(f"{self.file} must hold the text of the fault {self.name!r} once; it has it {found} times: {self.old!r}")
        return source.replace(self.old, self.new)


def faults(folder: Path = LISTS) -> list[Fault]:
    """All of the lists, in the order of their files.

    A list names the tests and contracts of a file, or of a folder, once: the longest name that fits a fault's file counts.
    """
    found = []
    for path in sorted(folder.glob("*.toml")):
        content = tomllib.loads(path.read_text())
        for entry in content["fault"]:
            file = entry["file"]
            found.append(Fault(**{"tests": _of(file, content["tests"]), "contracts": _of(file, content["contracts"]), **entry}))
    return found


def _of(file: str, known: Mapping[str, Sequence[str]]) -> Sequence[str]:
    fitting = [name for name in known if file == name or file.startswith(f"{name}/")]
    return known[max(fitting, key=len)] if fitting else ()


def copy_of_the_package(folder: Path) -> None:
    """Package and tests, as they are in the working tree."""
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, symlinks=True)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy2(ROOT / name, folder)


@contextmanager
def with_fault(copy: Path, fault: Fault) -> Iterator[None]:
    """A block in which the copy has the fault."""
    path = copy / fault.file
    source = path.read_text()
    bytecode = Path(importlib.util.cache_from_source(str(path)))
    try:
        path.write_text(fault.planted(source))
        bytecode.unlink(missing_ok=True)  # an edit within the second and of the same length would not be seen
        yield
    finally:
        path.write_text(source)
        bytecode.unlink(missing_ok=True)
