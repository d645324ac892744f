"""The demo in Python: align the embedded pipeline with a reward that is a plain function, and watch it with a hook.

python examples/quickstart.py [--total 20] [--prompts 4] [--json FILE]
"""

import argparse
import json
from pathlib import Path

from diffalign import (
    AlignmentLoop,
    FixedPlan,
    FlowMatchingPolicy,
    Hook,
    LoRA,
    PromptFile,
    ShiftedGrid,
    SoftmaxTB,
    StandardizedSum,
    TreeSampler,
)
from diffalign.shapeworld.recognition import find_objects


def reward(images, prompts):
    """The share of the objects found that the prompt mentions, colour and shape: any function of images and prompts will do."""
    pairs = zip(find_objects(images), prompts, strict=True)
    return [sum(f"{thing.color} {thing.shape}" in prompt for thing in found) / max(1, len(found)) for found, prompt in pairs]


class Table(Hook):
    """Prints one line a step, and keeps the numbers."""

    def __init__(self):
        self.rows = []

    def step(self, loop, report):
        self.rows.append({"step": report.step, **report.metrics})
        print(f"{report.step:4d}  reward {report.metrics['reward']:.3f}  diversity {report.metrics['diversity/l_gmd']:+.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--total", type=int, default=20, help="training steps")
    parser.add_argument("--prompts", type=int, default=4, help="prompts of a step (%(default)s)")
    parser.add_argument("--lora", default="runs/quickstart-lora", help="folder for the adapters")
    parser.add_argument("--json", type=Path, help="also write the table here")
    arguments = parser.parse_args()

    policy = FlowMatchingPolicy.from_pretrained("shapeworld", lora=LoRA(rank=16), grid=ShiftedGrid(2.0), max_sequence_length=16)
    table = Table()
    loop = AlignmentLoop(
        objective=SoftmaxTB(policy, beta=20.0),
        sampler=TreeSampler(steps=8, plan=FixedPlan(splits=(1, 2, 3), branches=3, eta=0.7)),
        rewards=reward,
        prompts=PromptFile("shapeworld/count"),
        aggregation=StandardizedSum(),
        prompts_per_step=arguments.prompts,
        hooks=[table],
    )
    loop.run(arguments.total)
    policy.save_lora(arguments.lora)
    if arguments.json:
        arguments.json.write_text(json.dumps(table.rows, indent=1))


if __name__ == "__main__":
    main()
