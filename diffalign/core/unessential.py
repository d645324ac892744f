"""Failures of pictures, reports and the like, which must not end a run."""

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def unessential(what: str) -> Iterator[None]:
    """Whatever fails inside costs no run: it is said once, and the run goes on.

    For pages, pictures, cards and trackers; never for weights, numbers, or anything that another step reads.

    Args:
        what: is then missing, for the message
    """
    try:
        yield
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        say_once(f"{what}: {type(error).__name__}: {lines[0][:300]}. The run goes on without.")


def say(message: str) -> None:
    """Print a line to stderr; where nobody reads it any more (a terminal that was closed), nothing happens."""
    with suppress(OSError):
        print(message, file=sys.stderr, flush=True)


@functools.cache
def say_once(message: str) -> None:
    """The same, once in a process however often it is asked for."""
    say(message)
