"""Short forms of a run file that the constructors' types do not show, written out before the types are looked at."""

from collections.abc import Mapping
from typing import Any

import attrs
import torch

from ..core import ConfigError
from ..core.learning_rates import WEIGHT_DECAY
from .overrides import Argument
from .signature import parameters


def written_out(content: Mapping[str, Any]) -> dict[str, Any]:
    """Write bare learning rates as the optimizers that a Python program means by them.

    `optimizers: 1e-4` is AdamW for all roles and `{policy: 1e-4}` for one, with the weight decay of the default optimizer, 1e-4.

    Args:
        content: keys of a run file, or of the command line; not changed

    Raises:
        ConfigError: a number stands where a role belongs, and is an argument of the optimizer by its name.
    """
    if "optimizers" not in content:
        return dict(content)
    given = content["optimizers"]
    inner = given.value if isinstance(given, Argument) else given
    if _is_number(inner):
        return {**content, "optimizers": {"default": _adamw(inner)}}
    if not isinstance(inner, Mapping):
        return dict(content)
    table = {role: _of_role(role, entry) for role, entry in inner.items()}
    return {**content, "optimizers": attrs.evolve(given, value=table) if isinstance(given, Argument) else table}


def _of_role(role: object, entry: Any) -> Any:
    number = entry.value if isinstance(entry, Argument) else entry
    if not _is_number(number):
        return entry
    if role in (parameters(torch.optim.AdamW) or {}):
        raise ConfigError(
            f"optimizers.{role} must be a role with its optimizer; got the number {number}. Write optimizers: "
            f"{{default: {{{role}: {number}}}}}"
        )
    return _adamw(number)


def _adamw(rate: float) -> dict[str, Any]:
    return {"class_path": "torch.optim.AdamW", "init_args": {"lr": rate, "weight_decay": WEIGHT_DECAY}}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
