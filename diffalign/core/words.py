"""Fields and arguments that hold one of a few words, which a `Literal` type lists."""

import typing
from types import NoneType
from typing import Any, Literal

import attrs


def words_of(kind: Any) -> tuple[Any, ...]:
    """List the words of a `Literal` type, and None at the end if the type allows it; nothing for other types."""
    if typing.get_origin(kind) is Literal:
        return typing.get_args(kind)
    inner = [words_of(member) for member in typing.get_args(kind) if member is not NoneType]
    words = inner[0] if len(inner) == 1 else ()
    return (*words, None) if words and NoneType in typing.get_args(kind) else words


def require_word(where: str, value: object, kind: Any) -> None:
    """Refuse a value that a `Literal` type, or one with None, does not list.

    Args:
        where: name of the field or argument in the message
        value: value that was given
        kind: the type

    Raises:
        ValueError: the value is no word of the type.
    """
    allowed = words_of(kind)
    if value in allowed:
        return
    words = [str(word) for word in allowed if word is not None]
    listed = f"{'one of ' if len(words) > 1 else ''}{', '.join(words)}{' or None' if None in allowed else ''}"
    raise ValueError(f"{where} must be {listed}; got {value!r}")


def allowed_word(instance: object, attribute: "attrs.Attribute[Any]", value: object) -> None:
    """Validate a field of attrs that is annotated with a `Literal` type.

    Raises:
        ValueError: the value is no word of the type.
    """
    require_word(f"{type(instance).__name__}.{attribute.alias}", value, attribute.type)
