"""Contracts as lists of named properties, and the results of checking them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import attrs

from ..core.own_line import at_own_line

Part = TypeVar("Part")


@attrs.frozen
class Property(Generic[Part]):
    """Property that every part of a kind must have.

    Args:
        name: a few words
        reason: consequence for a run if it does not hold, in one line
        check: raises if it does not hold; for a property over drawn cases, hypothesis has already reduced the case
    """

    name: str
    reason: str
    check: Callable[[Part], None]


@attrs.frozen
class Finding:
    """Result of checking a property.

    Args:
        name, reason: name and reason of the property
        failure: description of what happened, with the smallest case; empty if it holds
        skipped: reason why it was not checked; empty if it was checked
    """

    name: str
    reason: str
    failure: str = ""
    skipped: str = ""

    def __str__(self) -> str:
        if self.skipped:
            return f"skip  {self.name}: {self.skipped}"
        if not self.failure:
            return f"ok    {self.name}"
        body = "\n".join(f"        {line}" for line in self.failure.splitlines())
        return f"FAIL  {self.name}: {self.reason}\n{body}"


class PropertyError(AssertionError):
    """Error for a part that breaks the contract of its kind.

    Args:
        part: name of the part
        findings: all findings, including those that passed
    """

    def __init__(self, part: str, findings: Sequence[Finding]) -> None:
        self.part, self.findings = part, list(findings)
        failed = [finding for finding in findings if finding.failure]
        super().__init__(f"{part} breaks {len(failed)} of {len(findings)} properties:\n" + "\n".join(map(str, failed)))


class NotApplicableError(Exception):
    """Raised by a check that does not apply to this part; the text gives the reason."""


def examine(part: Part, properties: Sequence[Property[Part]], skip: Mapping[str, str] | None = None) -> list[Finding]:
    """Check every property. Failures are returned, not raised.

    Args:
        part: argument of the checks
        properties: the contract
        skip: property name -> why it need not hold for this part
    """
    skip = skip or {}
    if strangers := set(skip) - {known.name for known in properties}:
        names = ", ".join(repr(known.name) for known in properties)
        raise ValueError(f"skip names {sorted(strangers)[0]!r}; the properties are {names}")
    return [
        Finding(known.name, known.reason, skipped=skip[known.name]) if known.name in skip else _finding(part, known) for known in properties
    ]


def _finding(part: Any, known: Property[Any]) -> Finding:
    try:
        known.check(part)
    except NotApplicableError as reason:
        return Finding(known.name, known.reason, skipped=str(reason))
    except Exception as error:  # every error of a part is a finding about it
        notes = [note for note in getattr(error, "__notes__", ()) if "Falsifying example" in note]
        return Finding(known.name, known.reason, failure="\n".join([f"{type(error).__name__}: {error}{at_own_line(error)}", *notes]))
    return Finding(known.name, known.reason)


def require(part: str, findings: Sequence[Finding]) -> list[Finding]:
    """Return the findings if no property failed.

    Raises:
        PropertyError: a property failed; the message names all that failed.
    """
    if any(finding.failure for finding in findings):
        raise PropertyError(part, findings)
    return list(findings)


def holds(condition: object, message: str) -> None:
    """Raise AssertionError with a message unless the condition is true. (python -O would remove an `assert`.)"""
    if not condition:
        raise AssertionError(message)
