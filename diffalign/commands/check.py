"""Build everything and say what a step costs, without running or writing anything."""

import argparse
from collections.abc import Sequence

from .options import positive, run_argument


def configure(parser: argparse.ArgumentParser) -> None:
    run_argument(parser)
    parser.add_argument("--devices", type=positive, default=1, metavar="N", help="plan for N processes with a device each (%(default)s)")
    parser.add_argument("--memory", type=float, metavar="GIB", help="of a device: which row budget fits it")
    parser.add_argument("--teraflops", type=float, metavar="N", help="of a device; measured on this machine where it is not given")
    parser.add_argument("--shard", action="store_true", help="plan with weights spread over the devices")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from .. import config
    from ..costs.capacity import Cluster, plan
    from ..costs.forecast import forecast

    job = config.parse(options.run, overrides)
    loop = job.build()
    print(job.yaml())
    print(forecast(loop, job.tree["total"]))
    print(plan(loop, Cluster(options.devices, options.memory, options.teraflops, options.shard)))
    return 0
