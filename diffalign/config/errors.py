"""Texts of configuration errors: where, what must hold, what came, what to do."""

import difflib
import re
from collections.abc import Iterable, Sequence

from ..core import ConfigError
from ..core.own_line import own_line


class ConfigWarning(UserWarning):
    """Warning about a value of a configuration, or a file beside it, that is not used."""


_LONG = 100
"""Characters from which a sentence, such as a list of what there is, is said once in a message."""

_ATTRS = re.compile(r"^'(\w+)' must be (.+?)(?:: | \(got )(.+?)\)?$", re.DOTALL)


def nearest(name: str, known: Iterable[str]) -> str:
    """Suggest the most similar name: ' Did you mean X?', or ''."""
    names = [str(entry) for entry in known]
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if not found:  # difflib does not see names as similar that differ only in case
        found = [entry for entry in names if entry.lower() == name.lower()]
    return f" Did you mean {found[0]}?" if found else ""


def listed(names: Iterable[str], last: str = "or") -> str:
    """Join names to 'a, b or c'."""
    entries = list(names)
    return entries[0] if len(entries) == 1 else f"{', '.join(entries[:-1])} {last} {entries[-1]}" if entries else "none"


def shown(value: object) -> str:
    """Shorten a value for a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def together(errors: Sequence[ConfigError]) -> ConfigError:
    """Join errors of several parts to one message, a line for each part. A long last sentence is not repeated."""
    if len(errors) == 1:
        return errors[0]
    lines: list[str] = []
    for text in dict.fromkeys(str(error).strip() for error in errors):
        rest, _, last = text.rpartition(". ")
        said = rest and len(last) > _LONG and any(line.endswith(f". {last}") for line in lines)
        lines.append(f"- {rest}." if said else f"- {text}")
    return ConfigError("\n".join([f"{len(errors)} parts of the run cannot be built:", *lines]))


def refused(where: str, error: BaseException, made: str = "") -> ConfigError:
    """Convert an error of a constructor to a ConfigError that begins with the place of the part, and names the line in a user's own code.

    Args:
        where: dotted path of the part, "" for the run itself
        error: the error that was raised
        made: name of what was called
    """
    text = str(error.args[0]) if error.args and isinstance(error.args[0], str) and isinstance(error, ValueError | TypeError) else str(error)
    if found := _ATTRS.match(text):  # validators of attrs name only the field, not its class or place
        name, bound, got = found.groups()
        return ConfigError(f"{where}{'.' if where else ''}{name} must be {bound}; got {got}")
    line = "" if isinstance(error, ConfigError) else own_line(error)
    if not isinstance(error, ValueError):
        text = f"{made}{' raised ' * bool(made)}{type(error).__name__}: {text}"
    elif line and made and not text.startswith((f"{where}.", made.rpartition(".")[2])):
        text = f"{made}: {text}"
    text += f" ({line}; --debug shows the traceback)" if line else ""
    known = not where or text.startswith(f"{where}.")  # some messages contain their place already
    return ConfigError(text if known else f"{where}: {text}")
