"""List the parts that can stand in each place of a run; or the arguments of one part."""

import argparse
from collections.abc import Sequence

from .options import refuse_overrides


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="a part: a name from the list, or an import path")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from ..config import listing

    refuse_overrides("parts", "a name", overrides)
    print(listing.everything() if options.name is None else listing.one(options.name))
    return 0
