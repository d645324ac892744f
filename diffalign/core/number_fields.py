"""Fields of attrs and arguments that hold numbers: a text, a truth value or a part in their place is refused by name."""

import math
import numbers
from collections.abc import Callable
from typing import Any

import attrs

Validator = Callable[[Any, "attrs.Attribute[Any]", Any], Any]


def is_whole(value: object) -> bool:
    """True for a whole number, of Python or of numpy. A truth value is none, nor is 4.0."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_finite(value: object) -> bool:
    """True for a finite number, of Python or of numpy. A truth value is none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def require_number(where: str, value: object, kinds: str = "a number") -> None:
    """Refuse what is no number. One that is not finite passes, for a message that says more.

    Args:
        where: name of the field or argument in the message
        value: value that was given
        kinds: name of the values that may stand there

    Raises:
        ValueError: the value is none.
    """
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise ValueError(f"{where} must be {kinds}; got {value!r}"[:400])


def whole(least: int) -> Validator:
    """Make the validator of a field that holds a whole number of at least `least`."""

    def check(instance: object, attribute: "attrs.Attribute[Any]", value: Any) -> None:
        if not is_whole(value):
            raise ValueError(f"{_named(instance, attribute)} must be a whole number; got {value!r}"[:400])
        attrs.validators.ge(least)(instance, attribute, value)

    return check


def finite(limit: Validator) -> Validator:
    """Make the validator of a field that holds a finite number.

    Args:
        limit: validator of attrs for its range, such as `attrs.validators.gt(0)`
    """

    def check(instance: object, attribute: "attrs.Attribute[Any]", value: Any) -> None:
        if not is_finite(value):
            raise ValueError(f"{_named(instance, attribute)} must be a finite number; got {value!r}"[:400])
        limit(instance, attribute, value)

    return check


def _named(instance: object, attribute: "attrs.Attribute[Any]") -> str:
    return f"{type(instance).__name__}.{attribute.alias}"
