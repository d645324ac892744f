"""Source files of a user's own parts: what a run imports beside libraries. They are kept in the run's folder and imported from there."""

import ast
import importlib.util
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ..core import ConfigError
from .errors import ConfigWarning, listed

CODE = "code"
"""Name of the folder of source files in a run folder. Commands that read the run put it on the import path."""

_OWN = "diffalign"
_LIBRARY = tuple(Path(sysconfig.get_paths()[name]) for name in ("stdlib", "platstdlib"))


def make_importable(folder: Path) -> None:
    """Let parts be found beside a run file, after everything that is found already."""
    if str(folder.absolute()) not in sys.path:
        sys.path.append(str(folder.absolute()))


def remember(folder: Path) -> None:
    """Let the parts of a run be found in its own folder, or in that of a checkpoint's run, before anything else.

    Files of the same names where the command is given are not used; those that differ are named in a warning.

    Args:
        folder: folder of a run, or of a checkpoint in it

    Raises:
        ConfigError: another module of the same name is loaded already, from a file that differs.
    """
    run = folder.absolute().parent if (folder / "manifest.json").exists() else folder.absolute()
    code = run / CODE
    if not code.is_dir():
        return
    for file in sorted(code.rglob("*.py")):
        name = _module_of(file.relative_to(code))
        loaded = _loaded(name) or _found_in_package(name, file)
        if loaded is not None and loaded != file and loaded.exists() and loaded.read_bytes() != file.read_bytes():
            raise ConfigError(
                f"{file} must be the module {name!r} of this run; {loaded} is loaded as that, and differs. Look at such runs one at a "
                "time, each in a process of its own; to compare two versions of a part, train each under a module name of its own."
            )
    _widen_packages(code)
    if differing := _differing(code, Path.cwd()):
        shown = code.relative_to(Path.cwd()) if code.is_relative_to(Path.cwd()) else code
        verbs = "differs and is" if len(differing) == 1 else "differ and are"
        warnings.warn(
            f"own parts come from {shown}; {listed(differing, 'and')} {verbs} not used",
            ConfigWarning,
            stacklevel=2,
        )
    if str(code) in sys.path:
        sys.path.remove(str(code))
    sys.path.insert(0, str(code))


def _found_in_package(name: str, file: Path) -> Path | None:
    """Find the file that a module would be imported from, if its package is loaded already: that package is asked, not the import path."""
    parent = sys.modules.get(name.rpartition(".")[0])
    places = [] if parent is None else [Path(place) / file.name for place in vars(parent).get("__path__", ())]
    return next((place for place in places if place.exists()), None)


def _widen_packages(code: Path) -> None:
    """Let packages that are loaded from elsewhere, as from another run, find the modules that this run alone keeps of them."""
    for file in sorted(code.rglob("__init__.py")):
        name = _module_of(file.relative_to(code))
        places = vars(sys.modules[name]).get("__path__") if name in sys.modules else None
        if isinstance(places, list) and str(file.parent) not in places:
            places.append(str(file.parent))


def _differing(code: Path, folder: Path) -> list[str]:
    """Files of a folder that stand in a run's code under the same name with another content."""
    pairs = [(file, folder / file.relative_to(code)) for file in sorted(code.rglob("*.py"))]
    return [f"./{other.relative_to(folder)}" for file, other in pairs if other.is_file() and other.read_bytes() != file.read_bytes()]


def sources(names: Iterable[str]) -> dict[str, Path]:
    """Find the source files of modules, and of all modules that they import at any depth, without libraries.

    Args:
        names: names of modules; libraries, Python's own modules and this package are skipped

    Returns:
        Path below an import path, "package/module.py" -> file.
    """
    found: dict[str, Path] = {}
    left, seen = [*names], set()
    while left:
        name = left.pop()
        if name in seen or name == "__main__":
            continue
        seen.add(name)
        file = _source(name)
        if file is None:
            continue
        leaf = ["__init__.py"] if file.name == "__init__.py" else []
        found["/".join([*name.split("."), *leaf]) + ("" if leaf else ".py")] = file
        left += [name.rpartition(".")[0]] if "." in name else []
        left += _imported(file, name, bool(leaf))
    return dict(sorted(found.items()))


def keep(files: Mapping[str, Path], folder: Path) -> list[str]:
    """Copy source files into a run folder.

    Args:
        files: result of `sources`
        folder: folder of the run

    Returns:
        Those that were there already, and differed.
    """
    changed = []
    for name, file in files.items():
        kept = folder / CODE / name
        if kept.exists() and kept.samefile(file):
            continue
        if kept.exists() and kept.read_bytes() != file.read_bytes():
            changed.append(name)
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, kept)
    return changed


def forget(folder: Path, files: Mapping[str, Path]) -> None:
    """Remove the source files that a run folder keeps, except those of a new run, which may be imported from there.

    Args:
        folder: folder of the run
        files: result of `sources` for the new run
    """
    code, used = folder / CODE, {file.resolve() for file in files.values()}
    if not code.is_dir():
        return
    for path in [*sorted(code.rglob("*"), reverse=True), code]:  # a folder comes after what it holds
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.resolve() not in used:
            path.unlink()


def _module_of(file: Path) -> str:
    parts = file.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _loaded(name: str) -> Path | None:
    file = vars(sys.modules[name]).get("__file__") if name in sys.modules else None
    return None if file is None else Path(file)


def _source(name: str) -> Path | None:
    """Find the file of a module that belongs to no library, without importing the module."""
    if name.partition(".")[0] in {_OWN, *sys.stdlib_module_names}:
        return None
    file = _loaded(name)
    if file is None and "." not in name:
        spec = importlib.util.find_spec(name) if name not in sys.modules else None
        file = None if spec is None or spec.origin is None else Path(spec.origin)
    if file is None and "." in name:
        parent, _, leaf = name.rpartition(".")
        above = _source(parent)
        places = [] if above is None or above.name != "__init__.py" else [above.parent / f"{leaf}.py", above.parent / leaf / "__init__.py"]
        file = next((place for place in places if place.exists()), None)
    return None if file is None or file.suffix != ".py" or is_library(file) else file.absolute()


def is_library(file: Path) -> bool:
    """True for a file or a folder of an installed package or of Python itself."""
    return bool({"site-packages", "dist-packages"} & set(file.parts)) or any(file.is_relative_to(place) for place in _LIBRARY)


def _imported(file: Path, name: str, package: bool) -> Iterator[str]:
    """Names of the modules that a file imports, also inside functions; `from a import b` gives both a and a.b."""
    here = name if package else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = here.split(".")[: len(here.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            if source:
                yield from (source, *(f"{source}.{alias.name}" for alias in node.names))
