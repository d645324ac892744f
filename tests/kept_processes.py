"""What tests/test_sharded_calls.py runs in each process: `torchrun tests/kept_processes.py FOLDER`."""

import sys
from pathlib import Path

import attrs
import torch
from half_base import HalfBase
from torch.distributed.tensor import DTensor

from diffalign.core import AlignmentLoop, Prompt
from diffalign.objectives import SoftmaxTB
from diffalign.processes.devices import connect, disconnect
from diffalign.processes.sharding import FullySharded
from diffalign.prompts import Prompts
from diffalign.samplers import FixedPlan, TreeSampler
from diffalign.testing import TinyPolicy, channel_reward

TREE = TreeSampler(5, FixedPlan(splits=(1, 2)), rows=5)


def loop_of(policy, devices, sharding, sampler=TREE):
    sgd = {"default": lambda parameters: torch.optim.SGD(parameters, lr=0.1)}
    return AlignmentLoop(
        SoftmaxTB(policy, rows=3),
        sampler,
        channel_reward,
        Prompts(["left", "right", "left of it"]),
        prompts_per_step=3,
        optimizers=sgd,
        devices=devices,
        sharding=sharding,
    )


def scaled(devices, sharding):
    """Two steps above a base in float16; in the second process a gradient overflows once."""
    policy = HalfBase()
    policy.overflows = devices.rank
    loop = loop_of(policy, devices, sharding)
    loop.advance(2)
    spread = {parameter.dtype for parameter in policy.parameters() if isinstance(parameter, DTensor)}
    left = {name: parameter.detach().clone() for name, parameter in policy.trainable_parameters().items()}
    return {"weights": left, "spread": spread, "overflows": policy.overflows}


def kept(devices):
    """What a sampler that keeps its graph is told where weights are sharded."""
    try:
        loop_of(TinyPolicy(), devices, FullySharded(least=1), attrs.evolve(TREE, keep_graph=True))
    except ValueError as error:
        return str(error)
    return "taken"


class ReadsTwo(TinyPolicy):
    """Reads the prompts that it knows, and no others."""

    @property
    def examples(self):
        return Prompt("left"), Prompt("right")

    def encode(self, prompts):
        for prompt in prompts:
            if not prompt.startswith(("left", "right")):
                raise ValueError(f"this policy reads 'left' and 'right'; got {str(prompt)!r}")
        return super().encode(prompts)


def main(folder):
    torch.set_num_threads(1)
    devices = connect()
    facts = {
        "whole": scaled(devices, None),
        "sharded": scaled(devices, FullySharded(least=1)),
        "kept": kept(devices),
        "padded": padded(devices),
    }
    torch.save(facts, folder / f"facts-{devices.rank}.pt")
    disconnect(devices)


def padded(devices):
    """Calls that each process makes for the other, by a policy that cannot read the empty text."""
    loop = loop_of(ReadsTwo(), devices, FullySharded(least=1))
    loop.advance(1)
    return loop.lockstep.padded


if __name__ == "__main__":
    main(Path(sys.argv[1]))
