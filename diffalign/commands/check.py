"""Build everything and print the costs of a step, without writing anything; with --try, also do one small step."""

import argparse
from collections.abc import Sequence

from .options import positive, positive_real, run_argument


def configure(parser: argparse.ArgumentParser) -> None:
    run_argument(parser)
    parser.add_argument("--devices", type=positive, default=1, metavar="N", help="plan for N processes with a device each (%(default)s)")
    parser.add_argument("--memory", type=positive_real, metavar="GIB", help="memory of a device, to compute the row budget that fits")
    parser.add_argument(
        "--teraflops", type=positive_real, metavar="N", help="speed of a device in TFLOP/s; by default measured on this machine"
    )
    parser.add_argument(
        "--device", metavar="NAME", help="name of a device (h100, h200, a100, 4090, ...), to compute the least time of a step on it"
    )
    parser.add_argument(
        "--bandwidth", type=positive_real, metavar="TB/S", help="memory bandwidth of a device that has no name here; with --teraflops"
    )
    parser.add_argument("--try", dest="attempt", action="store_true", help="also do one step on two prompts, two rows at a time")
    parser.add_argument(
        "--no-weights",
        action="store_true",
        help="plan a published model by its shape, with nothing downloaded; rewards and evaluation are not built",
    )
    parser.add_argument("--shard", action="store_true", help="plan with weights sharded over the devices")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from .. import config
    from ..core import ConfigError
    from ..costs.activations import Activations
    from ..costs.attempt import attempt
    from ..costs.capacity import Cluster, capacity
    from ..costs.cards import asked
    from ..costs.forecast import forecast
    from ..costs.planned import planned
    from ..evaluation import HeldOutEvaluation

    try:
        known = asked(options.device, options.teraflops, options.bandwidth)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if options.no_weights and options.attempt:
        raise ConfigError("--try does a step, for which the weights are needed; leave out --no-weights")
    job = config.parse(options.run, overrides)
    evaluation, saved = None, 0
    if options.no_weights:
        plan = planned(job)
        loop, saved = plan.loop, plan.saved
    else:
        loop, hook = job.build_evaluated()
        evaluation = hook if isinstance(hook, HeldOutEvaluation) else None
        loop.reach()
    print(job.yaml())
    activations = Activations.of(loop)
    print(forecast(loop, job.tree["total"], activations, saved))
    memory = options.memory if options.memory is not None or known is None else known.memory
    print(capacity(loop, Cluster(options.devices, memory, options.teraflops, options.shard, known, saved), activations))
    if options.no_weights:
        print(f"not built           rewards ({', '.join(plan.rewards)}) and evaluation: their memory and time come on top")
    if options.attempt:
        print(attempt(loop, job.tree["total"], evaluation))
    return 0
