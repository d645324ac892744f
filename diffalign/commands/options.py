"""Arguments and answers that several commands share."""

import argparse
import math
import sys
from collections.abc import Sequence

_RUN = "a run file, a run folder, or the name of a built-in run such as shapeworld_tmpo"
_OVERRIDES = "Any key of the run can be replaced after RUN by its dotted path: --sampler.steps 6 --sampler.plan.eta=0.9 --total 2"


def run_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument RUN and the help on overrides after it."""
    parser.add_argument("run", metavar="RUN", help=_RUN)
    parser.epilog = _OVERRIDES


def refuse_overrides(command: str, takes: str, overrides: Sequence[str]) -> None:
    """Refuse overrides for a command without a run whose keys could be replaced.

    Raises:
        ConfigError: there are overrides.
    """
    from ..core import ConfigError

    if overrides:
        raise ConfigError(f"{command} takes {takes} and nothing else; got {' '.join(overrides)}")


def positive(text: str) -> int:
    """Parse a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {number}")
    return number


def positive_real(text: str) -> float:
    """Parse a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0; got {text!r}")
    return number


def say(message: str, code: int) -> int:
    """Print to stderr; returns the exit code."""
    print(message, file=sys.stderr)
    return code
