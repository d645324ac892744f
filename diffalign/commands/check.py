"""Build everything and print the costs of a step, without running or writing anything."""

import argparse
from collections.abc import Sequence

from .options import positive, run_argument


def configure(parser: argparse.ArgumentParser) -> None:
    run_argument(parser)
    parser.add_argument("--devices", type=positive, default=1, metavar="N", help="plan for N processes with a device each (%(default)s)")
    parser.add_argument("--memory", type=float, metavar="GIB", help="memory of a device, to compute the row budget that fits")
    parser.add_argument("--teraflops", type=float, metavar="N", help="speed of a device in TFLOP/s; by default measured on this machine")
    parser.add_argument("--shard", action="store_true", help="plan with weights sharded over the devices")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from .. import config
    from ..costs.capacity import Cluster, capacity
    from ..costs.forecast import forecast

    job = config.parse(options.run, overrides)
    loop = job.build()
    print(job.yaml())
    print(forecast(loop, job.tree["total"]))
    print(capacity(loop, Cluster(options.devices, options.memory, options.teraflops, options.shard)))
    return 0
