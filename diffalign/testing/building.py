"""Construction of parts that are checked, and refusals of those that cannot be built."""

import inspect
from collections.abc import Sequence
from typing import Any


def required(part: Any) -> list[str]:
    """Names of the parameters of a class or function that have no default."""
    parameters = inspect.signature(part).parameters.values()
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [known.name for known in parameters if known.default is inspect.Parameter.empty and known.kind not in kinds]


def built(part: type) -> Any:
    """Build a part without arguments.

    Raises:
        ValueError: its class is abstract, or a parameter has no default.
    """
    _require_complete(part)
    if missing := required(part):
        raise ValueError(
            f"{part.__name__} must be built without arguments to be checked; {_listed(missing)} no default. Write a function without "
            "arguments that builds one, and give its path."
        )
    return part()


def require_from_policy(make: Any) -> None:
    """Refuse an objective that cannot be built from a policy alone.

    Args:
        make: the class of the objective, or a function that builds it

    Raises:
        ValueError: the class is abstract, its parameter for the weights is not called `policy`, or another parameter has no default.
    """
    name = str(getattr(make, "__name__", "the objective"))
    needed = required(make)
    if isinstance(make, type):
        _require_complete(make)
        if "policy" not in inspect.signature(make).parameters:
            found = f"`{needed[0]}`" if needed else "none of that name"
            raise ValueError(
                f"the constructor of {name} must call its parameter for the aligned weights `policy`, as run files do; it has {found}"
            )
    more = [parameter for parameter in needed if parameter != "policy"] if "policy" in needed else needed[1:]
    if more:
        raise ValueError(
            f"{name} must be built from a policy alone to be checked; {_listed(more)} no default. Write a function of `policy` that builds "
            "one, and give its path."
        )


def _require_complete(part: type) -> None:
    if inspect.isabstract(part):
        lacking = ", ".join(sorted(name for name, member in inspect.getmembers(part) if _is_open(member)))
        raise ValueError(
            f"{part.__name__} cannot be built: it must define {lacking}, which its base class leaves open. Is a name misspelt?"
        )


def _is_open(member: object) -> bool:
    return bool(getattr(member, "__isabstractmethod__", False))


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names)} {'has' if len(names) == 1 else 'have'}"
