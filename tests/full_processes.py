"""What the tests of sharded full fine-tuning run in each process: `torchrun tests/full_processes.py FOLDER CASE ...`."""

import os
import sys
import time
from pathlib import Path

import torch
import two_processes
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from diffalign.core import AlignmentLoop, Average
from diffalign.core.spread import whole
from diffalign.objectives import SoftmaxTB, SurrogateReward
from diffalign.policies import NetworkPolicy, TDMPolicy
from diffalign.runs.checkpoints import Checkpoints
from diffalign.samplers import DeterministicSampler
from diffalign.testing import channel_reward


class Fails(torch.autograd.Function):
    """Nothing, but a backward pass for which there is no memory."""

    @staticmethod
    def forward(context, tensor):
        return tensor.clone()

    @staticmethod
    def backward(context, gradient):
        raise torch.OutOfMemoryError("no memory")


class Blocks(nn.Module):
    """A network of three blocks whose sizes do not divide by two; in the second process its second block may fail.

    Args:
        checkpointing: recompute the activations of a block
        fails: "rollout", "update" or "backward": where it has no memory; "" nowhere
        after: calls of that kind that succeed
        width: of the blocks
    """

    def __init__(self, checkpointing: bool = False, fails: str = "", after: int = 0, width: int = 7) -> None:
        super().__init__()
        self.checkpointing, self.fails, self.left = checkpointing, fails, after
        self.start = nn.Linear(4, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, 9), nn.Tanh(), nn.Linear(9, width)) for _ in range(3))
        self.gain = nn.Parameter(torch.ones(1))  # one process has no part of it
        self.end = nn.Linear(width, 3)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * min(0.4, parameter.shape[-1] ** -0.5))

    def forward(self, latents, sigma):
        hidden = self.start(torch.cat([latents, sigma[:, None]], dim=1))
        for place, block in enumerate(self.blocks):
            hidden = hidden + (checkpoint(block, hidden, use_reentrant=False) if self.checkpointing else block(hidden))
            if place == 1 and self.fails and os.environ.get("RANK") == "1":
                hidden = self._fail(hidden)
        return self.gain * self.end(hidden)

    def _fail(self, hidden):
        if self.fails != ("update" if torch.is_grad_enabled() else "rollout") and not (self.fails == "backward" and hidden.requires_grad):
            return hidden
        self.left -= 1
        if self.left >= 0:
            return hidden
        print(f"failed at {time.time()}", file=sys.stderr)
        if self.fails == "backward":
            return Fails.apply(hidden)
        raise torch.OutOfMemoryError("no memory")


def pixel(latents):
    return latents.sigmoid()[:, :, None, None]


def policy(**options):
    return NetworkPolicy(Blocks(**options), (3,), pixel)


def tmpo(**options):
    objective = SoftmaxTB(policy(**options), updates=2, rows=3)
    return AlignmentLoop(objective, two_processes.TREE, channel_reward, two_processes.PROMPTS, **settings())


def tdm_r1():
    student = TDMPolicy(policy(), steps=4)
    objective = SurrogateReward(student, teacher=student.fork(), guidance=2.0, rows=4)
    return AlignmentLoop(objective, DeterministicSampler(4, 3, rows=5), channel_reward, two_processes.PROMPTS, **settings())


def settings():
    return {**two_processes.settings(), "max_grad_norm": 0.01, "average": Average(0.5)}


LOOPS = {"tmpo": tmpo, "recomputed": lambda: tmpo(checkpointing=True), "tdm_r1": tdm_r1}


def weights(loop):
    return {f"{role}.{n}": whole(p).clone() for role, policy in loop.policies().items() for n, p in policy.named_parameters()}


def train(name, folder, steps=3):
    loop = LOOPS[name]()
    before = dict(getattr(loop.devices, "moved", {}))
    loop.run(steps)
    moved = {verb: count - before.get(verb, 0) for verb, count in getattr(loop.devices, "moved", {}).items()}
    states = [value for optimizer in loop.running.values() for state in optimizer.state.values() for value in state.values()]
    spread = [p for policy in loop.policies().values() for p in policy.parameters() if isinstance(p, DTensor)]
    facts = {
        "spread": len(spread),
        "here": sum(p.to_local().numel() for p in spread),
        "state": sum(value.to_local().numel() for value in states if isinstance(value, DTensor)),
        "moved": moved,
        "calls": sum(policy.counter.calls for policy in loop.policies().values()),
    }
    torch.save({"weights": weights(loop), **facts}, folder / f"{name}-{loop.devices.rank}.pt")


def resumed(folder, devices):
    """Two steps; then the second of them again, sharded and not, from the checkpoint after the first."""
    sharded = two_processes.SETTINGS["sharding"]
    runs = {"unbroken": (sharded, None), "sharded": (sharded, sharded), "whole": (sharded, None), "spread": (None, sharded)}
    for name, (before, after) in runs.items():
        place = folder / name
        two_processes.SETTINGS["sharding"] = before
        first = tmpo()
        first.hooks = [Checkpoints(place, every=1)]
        first.run(2 if name == "unbroken" else 1)
        last = first
        if name != "unbroken":
            two_processes.SETTINGS["sharding"] = after
            last = tmpo()
            last.hooks = [Checkpoints(place, every=1)]
            last.run(2, last.hooks[0].restore(last))
        torch.save(weights(last), folder / f"{name}-{devices.rank}.pt")


def undone(folder, devices):
    """In the second step the second process meets a loss that is not a number in the second update: the first is taken back."""
    loop = tmpo()
    loop.run(1)
    before, inner = weights(loop), loop.objective.phases()[0].losses

    def losses(batch, update):
        for loss in inner(batch, update):
            broken = devices.rank == 1 and update == 1
            yield type(loss)(loss.value * float("nan"), loss.metrics) if broken else loss

    (phase,) = loop.objective.phases()
    loop._update.phases = (type(phase)(phase.trains, losses, phase.repeats),)
    state = [whole(v).clone() for s in loop.running["policy"].state.values() for v in s.values()]
    two_processes.said(loop, folder, devices, 2, 1)
    after = [whole(v).clone() for s in loop.running["policy"].state.values() for v in s.values()]
    facts = {"before": before, "after": weights(loop), "state": all(map(torch.equal, state, after))}
    loop._update.phases = (phase,)
    loop.run(2, 1)  # nothing is left of what failed
    torch.save({**facts, "again": weights(loop)}, folder / f"undone-{devices.rank}.pt")


def no_room_to_decode(folder, devices):
    """The second process cannot decode; the first is told."""
    loop = tmpo()
    inner = loop.objective.policy._decode

    def decode(latents):
        if devices.rank == 1:
            raise torch.OutOfMemoryError("no memory")
        return inner(latents)

    loop.objective.policy._decode = decode
    two_processes.said(loop, folder, devices)


CASES = {"resumed": resumed, "undone": undone, "no_room_to_decode": no_room_to_decode}


if __name__ == "__main__":
    two_processes.run(Path(sys.argv[1]), sys.argv[2:], train, LOOPS, CASES)
