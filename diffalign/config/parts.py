"""Search for parts: those of the package, those of other distributions, and any object by its import path.

There is no registry. A part of the package is a public class in one of its folders. Another distribution announces a part as an entry
point of the group "diffalign.parts" (name = "module:object"). Any other part has an import path, "package.module.Name" or
"package.module:Name".
"""

import functools
import importlib
import importlib.metadata
import inspect
import pkgutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs

from .. import core
from ..core.own_line import at_own_line
from ..objectives import Budget
from ..samplers import Plan
from .errors import nearest
from .signature import accepts, is_callable, is_slot
from .sources import is_library

GROUP = "diffalign.parts"
"""Name of the entry point group."""

FOLDERS = (
    "core",
    "prompts",
    "policies",
    "samplers",
    "objectives",
    "rewards",
    "shapeworld.scorers",
    "digits.policy",
    "digits.rewards",
    "evaluation",
    "tracking",
    "voting",
)
"""Folders with the package's own parts."""

SLOTS: Mapping[str, Any] = {
    "Policy": core.Policy,
    "TrajectorySampler": core.TrajectorySampler,
    "Plan": Plan,
    "Rollout": core.Rollout,
    "Objective": core.Objective,
    "Reward": core.Reward,
    "Aggregation": core.Aggregation,
    "TransitionKernel": core.TransitionKernel,
    "PromptSource": core.PromptSource,
    "Hook": core.Hook,
    "Scalar": core.Scalar,
    "Budget": Budget,
}
"""Types of the places for parts, by name."""


@attrs.frozen
class Announced:
    """Part with a short name.

    Args:
        name: the short name
        target: the class, classmethod, function or object; None if it could not be loaded
        distribution: name and version of the distribution that ships it; "" for this package
        error: reason why it could not be loaded
    """

    name: str
    target: Any
    distribution: str = ""
    error: str = ""

    @property
    def summary(self) -> str:
        """First line of its docstring."""
        return (inspect.getdoc(self.target) or "").partition("\n")[0]


@functools.cache
def own() -> Mapping[str, Announced]:
    """Parts of the package by class name. Further constructors of a class are listed as Class.method."""
    found: dict[str, Announced] = {}
    for module in _modules():
        if isinstance(module, Announced):
            found[module.name] = module
            continue
        for name, target in vars(module).items():
            if name.startswith("_") or not inspect.isclass(target) or target.__module__ != module.__name__:
                continue
            if not inspect.isabstract(target) and target not in SLOTS.values():
                found[name] = Announced(name, target)
                found.update(
                    {f"{name}.{method}": Announced(f"{name}.{method}", getattr(target, method)) for method in _constructors(target)}
                )
    return found


def _modules() -> Iterator[ModuleType | Announced]:
    """Modules of the folders. A module that cannot be imported, because a package that it needs is missing, is given with its error."""
    names = [f"diffalign.{folder}" for folder in FOLDERS]
    while names:
        name = names.pop(0)
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            yield Announced(name, None, error=f"{type(error).__name__}: {error}")
            continue
        yield module
        names += [entry.name for entry in pkgutil.iter_modules(getattr(module, "__path__", ()), f"{name}.")]


def _constructors(target: type) -> list[str]:
    methods = {name for name, value in vars(target).items() if isinstance(value, classmethod) and not name.startswith("_")}
    return sorted(name for name in methods if accepts(target, getattr(target, name)) == "call")


@functools.cache
def _entries(path: tuple[str, ...]) -> tuple[importlib.metadata.EntryPoint, ...]:
    return tuple(sorted(importlib.metadata.entry_points(group=GROUP), key=lambda entry: entry.name))


def third_party(name: str | None = None) -> list[Announced]:
    """Entry points of all installed distributions, or those of one name. One that cannot be loaded carries its error."""
    return [_load(entry) for entry in _entries(tuple(sys.path)) if name in (None, entry.name)]


def _load(entry: importlib.metadata.EntryPoint) -> Announced:
    distribution = "an unknown distribution" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"
    try:
        return Announced(entry.name, entry.load(), distribution)
    except Exception as error:  # importing runs foreign code: one broken package must not hide the others
        return Announced(entry.name, None, distribution, f"{type(error).__name__}: {error}")


def candidates(members: Iterable[Any]) -> dict[str, Any]:
    """Parts that fit one of some slots, by short name.

    Beside the package's own parts, these are classes that are already imported, such as torch's optimizers or those of a user's script.
    """
    wanted = [member for member in members if is_slot(member)]
    classes = [member for member in wanted if not is_callable(member)]
    classes += [made for member in wanted if is_callable(member) and is_slot(made := (*getattr(member, "__args__", ()), None)[-2])]
    found: dict[str, Any] = {}
    for slot in classes:  # torch's AdamW has precedence over another library's, which its import path still finds
        found.update(sorted(_subclasses(slot), key=lambda entry: _distribution(entry[1]) == _distribution(slot)))
    # an own part has precedence over a foreign one of the same name, which its import path still finds
    found.update({part.name: part.target for part in own().values() if any(accepts(slot, part.target) for slot in classes)})
    if len(found) > 1:  # a base class that is not abstract is not a choice: Hook, torch's Optimizer
        found = {name: target for name, target in found.items() if target not in classes}
    return dict(sorted(found.items()))


def _distribution(target: type) -> str:
    return target.__module__.partition(".")[0]


def _subclasses(slot: type) -> Iterator[tuple[str, type]]:
    public = not any(name.startswith("_") for name in (*slot.__module__.split(".")[1:], slot.__name__)) and "<" not in slot.__qualname__
    if public and accepts(slot, slot) == "call":
        yield slot.__name__, slot
    subclasses: list[type] = type.__subclasses__(slot)
    for subclass in subclasses:
        yield from _subclasses(subclass)


def find(name: str, members: Iterable[Any] = ()) -> Any:
    """Find the object of a short name that fits one of some slots, or of an import path.

    Raises:
        LookupError: there is no such module, attribute or short name. The message names the first two; it is empty for a short name.
    """
    fitting = candidates(members)
    if name in fitting:
        return fitting[name]
    head, _, method = name.partition(".")
    if method and (head in fitting or head in own()):
        target = fitting[head] if head in fitting else own()[head].target
        if not hasattr(target, method):
            raise LookupError(f"{head} has no {method!r}.{nearest(method, vars(target))}")
        return getattr(target, method)
    if announced := [*filter(None, [own().get(name)]), *third_party(name)]:
        if announced[0].error:
            source = f" of {announced[0].distribution}" if announced[0].distribution else ""
            raise LookupError(f"{name!r}{source} cannot be loaded: {announced[0].error}")
        return announced[0].target
    if "." not in name and ":" not in name:
        raise LookupError
    return _imported(name)


def suggestion(name: str, members: Iterable[Any]) -> str:
    """End of a message about a name that was not found: the most similar name, and all known names."""
    known = list(candidates(members))
    guess = nearest(name, [*known, *(entry.name for entry in _entries(tuple(sys.path)))])
    names = f"Known: {', '.join(known)}; or" if known else "Give"
    return f"{guess} {names} an import path such as package.module.Name."


def _imported(path: str) -> Any:
    module_path, colon, inner = path.partition(":")
    names = module_path.split(".")
    for length in [len(names)] if colon else range(len(names) - 1, 0, -1):
        module_name = ".".join(names[:length])
        try:
            target: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            missing = error.name or ""
            if not (module_name == missing or module_name.startswith(f"{missing}.")):
                raise LookupError(f"module {module_name!r} cannot be imported: {error}{at_own_line(error)}") from error
            if length > 1 and not colon:
                continue
            raise LookupError(f"there is no module {missing!r}{_beside(missing)}") from error
        except Exception as error:  # importing runs the module's code, which may raise anything
            raise LookupError(f"module {module_name!r} cannot be imported: {type(error).__name__}: {error}{at_own_line(error)}") from error
        for attribute in inner.split(".") if colon else names[length:]:
            if not hasattr(target, attribute):
                guess = nearest(attribute, [*vars(target), *_modules_in(vars(target).get("__path__", ()))])
                raise LookupError(f"{module_name!r} has no {attribute!r}.{guess}{'' if guess else _file_of(target)}")
            target = getattr(target, attribute)
        return target
    raise LookupError(f"{path!r} is no import path")


def _beside(missing: str) -> str:
    """Question about the most similar module of its package, or of the user's own: where the command is given, and beside the run file."""
    package, _, name = missing.rpartition(".")
    own = [entry for entry in sys.path if not is_library(Path(entry).absolute())]
    guess = nearest(name, _modules_in(vars(sys.modules[package]).get("__path__", ()) if package else own))
    return f".{guess}" if guess else ""


def _modules_in(folders: Iterable[str]) -> list[str]:
    return [module.name for module in pkgutil.iter_modules(folders)]


def _file_of(target: Any) -> str:
    """Sentence about the file of a module: it may be another one than the user means. '' for what is no module."""
    if not inspect.ismodule(target):
        return ""
    file = vars(target).get("__file__")
    if target.__name__.partition(".")[0] in sys.stdlib_module_names:
        return f" It is Python's own module{f', {file}' if file else ''}: give your file another name."
    return f" The module is {file}." if file else ""


def import_path(target: Any, name: str) -> str:
    """Path that imports an object again, or `name` if the object has no import path of its own.

    An object that a package exports has the path of the package, not that of the module that defines it. So run folders stay readable
    when files of this package move.
    """
    owner = getattr(target, "__self__", None)
    if inspect.isclass(owner):  # an inherited classmethod is named by the class through which it was found
        return f"{import_path(owner, name)}.{target.__name__}"
    module, inner = getattr(target, "__module__", None), getattr(target, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(inner, str) or "<" in inner:
        return name
    return f"{_public(module, inner, target)}.{inner}"


def _public(module: str, inner: str, target: Any) -> str:
    """Outermost package below the first that exports an object; else its module."""
    names = module.split(".")
    for length in range(2, len(names)) if names[0] == "diffalign" else ():
        package = ".".join(names[:length])
        if inner in getattr(sys.modules.get(package), "__all__", ()) and getattr(sys.modules[package], inner, None) is target:
            return package
    return module
