"""A contract as a list of named properties, and what came of checking them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import attrs

Part = TypeVar("Part")


@attrs.frozen
class Property(Generic[Part]):
    """One thing that every part of a kind must do.

    Args:
        name: a few words
        reason: what goes wrong in a run where it does not hold, in a line
        check: raises if it does not hold; for a property over drawn cases hypothesis has shrunk the case by then
    """

    name: str
    reason: str
    check: Callable[[Part], None]


@attrs.frozen
class Finding:
    """What came of a property.

    Args:
        name, reason: of the property
        failure: what happened, with the smallest case; empty where it holds
        skipped: why it was not checked; empty where it was
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
    """A part does not do what parts of its kind must do.

    Args:
        part: its name
        findings: all of them, passed ones included
    """

    def __init__(self, part: str, findings: Sequence[Finding]) -> None:
        self.part, self.findings = part, list(findings)
        failed = [finding for finding in findings if finding.failure]
        super().__init__(f"{part} breaks {len(failed)} of {len(findings)} properties:\n" + "\n".join(map(str, failed)))


class NotApplicableError(Exception):
    """Raised by a check that has nothing to say about this part; the text says why."""


def examine(part: Part, properties: Sequence[Property[Part]], skip: Mapping[str, str] | None = None) -> list[Finding]:
    """Check every property; nothing is raised but for a name in `skip` that no property has.

    Args:
        part: what the checks are called with
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
    except Exception as error:  # whatever a part raises is a finding about it
        notes = [note for note in getattr(error, "__notes__", ()) if "Falsifying example" in note]
        return Finding(known.name, known.reason, failure="\n".join([f"{type(error).__name__}: {error}", *notes]))
    return Finding(known.name, known.reason)


def require(part: str, findings: Sequence[Finding]) -> list[Finding]:
    """The findings, if no property failed.

    Raises:
        PropertyError: naming those that did.
    """
    if any(finding.failure for finding in findings):
        raise PropertyError(part, findings)
    return list(findings)


def holds(condition: object, message: str) -> None:
    """Raise AssertionError with a message unless the condition is true: `assert` would vanish under python -O."""
    if not condition:
        raise AssertionError(message)
