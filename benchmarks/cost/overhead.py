"""How much of a training step is spent outside network, decoder and reward.

Runs TMPO on the embedded pipeline as the demo does. "network" is every denoiser forward pass of policy and reference, and the backward
pass; what is left is the loop: noise, indexing, losses, clipping, optimizer, metrics. Read the shares, not the seconds.

Args:
    steps: after the one that warms up
    prompts: of a step
    json: also write the table here
"""

import time
from pathlib import Path

import torch

from benchmarks.record import write
from diffalign import AlignmentLoop
from diffalign.core import Progress, ShiftedGrid, StandardizedSum
from diffalign.objectives import SoftmaxTB
from diffalign.policies import FlowMatchingPolicy, LoRA
from diffalign.prompts import PromptFile
from diffalign.samplers import FixedPlan, TreeSampler
from diffalign.shapeworld import CountReward


class Stopwatch:
    """Adds up the seconds inside some calls."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function):
        def timed(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def main(steps: int = 6, prompts: int = 4, json: Path | None = None) -> None:
    policy = FlowMatchingPolicy.from_pretrained("shapeworld", lora=LoRA(), grid=ShiftedGrid(2.0), max_sequence_length=16)
    forward, backward = Stopwatch(), Stopwatch()
    policy.family.velocity = forward.around(policy.family.velocity)
    torch.Tensor.backward = backward.around(torch.Tensor.backward)
    source = PromptFile("shapeworld/count")
    loop = AlignmentLoop(
        objective=SoftmaxTB(policy),
        sampler=TreeSampler(steps=8, plan=FixedPlan(splits=(1, 2, 3))),
        rewards=CountReward(),
        prompts=source,
        aggregation=StandardizedSum(),
    )
    loop.step(source.draw(0, prompts), Progress(0, steps + 1))  # warm-up
    forward.seconds = backward.seconds = 0.0
    loop.ledger.seconds.clear()
    start = time.perf_counter()
    for step in range(1, steps + 1):
        loop.step(source.draw(step, prompts), Progress(step, steps + 1))
    total = time.perf_counter() - start
    stages = {
        "network forward": forward.seconds,
        "network backward": backward.seconds,
        "decoder": loop.ledger.seconds["decode"],
        "reward": loop.ledger.seconds["reward"],
    }
    stages["everything else"] = total - sum(stages.values())
    print(f"{'stage':<20}{'share':>8}{'ms per step':>14}")
    for name, seconds in stages.items():
        print(f"{name:<20}{seconds / total:>8.1%}{1000 * seconds / steps:>14.1f}")
    write(json, {"steps": steps, "prompts_per_step": prompts, "shares": {name: seconds / total for name, seconds in stages.items()}})
