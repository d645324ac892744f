"""How much of a training step is spent outside network, decoder and reward.

python benchmarks/overhead.py [--steps 6] [--json FILE]

Runs TMPO on the embedded pipeline as the demo does. "network" is every denoiser forward pass of policy and reference, and the backward
pass; what is left is the loop: noise, indexing, losses, clipping, optimizer, metrics. Read the shares, not the seconds.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from diffalign import AlignmentLoop, Progress
from diffalign.core import ShiftedGrid, StandardizedSum
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--prompts", type=int, default=4, help="prompts per step")
    parser.add_argument("--json", type=Path, help="also write the table here")
    arguments = parser.parse_args()

    policy = FlowMatchingPolicy.from_pretrained("shapeworld", lora=LoRA(), grid=ShiftedGrid(2.0), max_sequence_length=16)
    forward, backward = Stopwatch(), Stopwatch()
    policy.family.velocity = forward.around(policy.family.velocity)
    torch.Tensor.backward = backward.around(torch.Tensor.backward)
    prompts = PromptFile("shapeworld/count")
    loop = AlignmentLoop(
        objective=SoftmaxTB(policy),
        sampler=TreeSampler(steps=8, plan=FixedPlan(splits=(1, 2, 3))),
        rewards=CountReward(),
        prompts=prompts,
        aggregation=StandardizedSum(),
    )
    loop.step(prompts.draw(0, arguments.prompts), Progress(0, arguments.steps + 1))  # warm-up
    forward.seconds = backward.seconds = 0.0
    loop.ledger.seconds.clear()
    start = time.perf_counter()
    for step in range(1, arguments.steps + 1):
        loop.step(prompts.draw(step, arguments.prompts), Progress(step, arguments.steps + 1))
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
        print(f"{name:<20}{seconds / total:>8.1%}{1000 * seconds / arguments.steps:>14.1f}")
    if arguments.json:
        numbers = {"steps": arguments.steps, "prompts_per_step": arguments.prompts, "shares": {k: v / total for k, v in stages.items()}}
        arguments.json.write_text(json.dumps(numbers, indent=1))


if __name__ == "__main__":
    main()
