"""Build everything and say what a step costs, without running or writing anything."""

import argparse
from collections.abc import Sequence

from .options import run_argument


def configure(parser: argparse.ArgumentParser) -> None:
    run_argument(parser)


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from .. import config
    from ..forecast import forecast

    job = config.parse(options.run, overrides)
    loop = job.build()
    print(job.yaml())
    print(forecast(loop, job.tree["total"]))
    return 0
