"""List what can be plugged in where; or what one part takes."""

import argparse
from collections.abc import Sequence

from .options import refuse_overrides


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="a part: a name of the list or an import path")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from ..config import listing

    refuse_overrides("parts", "a name", overrides)
    print(listing.everything() if options.name is None else listing.one(options.name))
    return 0
