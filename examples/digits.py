"""Even digits, please: the same handwriting aligned by Flow-GRPO and by Softmax Trajectory Balance, side by side.

python examples/digits.py [--steps 300] [--seed 0] [--out digits.png] [--json FILE]

A flow of handwritten digits ships with the package. Asked for "a digit", it draws all ten; the reward is a black box that says yes to even
ones. Both objectives draw the same trees of trajectories from the same noise, take the same steps, and are measured on the same further
noise: reward, effective number of the five even digits that are left (exp of the entropy of their shares), and KL divergence of the shares
from the exact optimum, the base tilted by exp(beta R), in nats. About a minute on one free core.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from diffalign import AlignmentLoop, Prompt
from diffalign.core import Objective, Policy, Progress, Streams
from diffalign.digits import ClassReward, DigitsPolicy, class_shares, distance_to_real, effective_classes, kl, tilt
from diffalign.objectives import FlowGRPO, SoftmaxTB
from diffalign.prompts import Prompts
from diffalign.samplers import DeterministicSampler, FixedPlan, TreeSampler

PROMPT = Prompt("a digit")
EVEN = (0, 2, 4, 6, 8)
REWARD = ClassReward(EVEN)
BETA = 20.0
"""Nats of log-probability for an even digit."""
TREE = TreeSampler(steps=8, plan=FixedPlan(splits=(1, 2, 3), branches=3, eta=0.7))  # 27 trajectories that share prefixes
OBJECTIVES: dict[str, Callable[[Policy], Objective]] = {
    "Flow-GRPO": lambda policy: FlowGRPO(policy, kl=0.0),
    "Softmax-TB": lambda policy: SoftmaxTB(policy, beta=BETA),
}


def align(objective: Callable[[Policy], Objective], steps: int, seed: int) -> Policy:
    """The flow after some steps of 8 trees."""
    policy = DigitsPolicy.from_pretrained("digits", device="cpu")
    loop = AlignmentLoop(
        objective=objective(policy),
        sampler=TREE,
        rewards=REWARD,
        prompts=Prompts([PROMPT]),
        prompts_per_step=8,
        optimizers={"default": lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)},
        seed=seed,
    )
    loop.run(steps)
    return policy


@torch.no_grad()
def drawn(policy: Policy, sampler: TreeSampler | DeterministicSampler, prompts: int) -> Tensor:
    """Pictures [K, 3, 64, 64] from noise that is the same for every policy."""
    forest = sampler.sample(policy, policy.encode([PROMPT] * prompts), Progress(0, 1), Streams(2026))
    return policy.decode(forest.samples)


def measure(policy: Policy, target: Tensor) -> dict[str, float]:
    """What the objective's own sampler draws."""
    images = drawn(policy, TREE, 64)
    shares = class_shares(images)
    return {
        "reward": float(REWARD(images, [PROMPT] * len(images)).mean()),
        "even digits": effective_classes(shares, EVEN),
        "distance": distance_to_real(images),
        "from the optimum": kl(target, shares.clamp(min=1 / len(images))),
    }


def sheet(panels: dict[str, Tensor], table: dict[str, dict[str, float]], columns: int = 9) -> Image.Image:
    """72 pictures of each policy, from the same noise."""
    cell, gap, head = 34, 26, 58
    rows = len(next(iter(panels.values()))) // columns
    width = columns * cell
    image = Image.new("RGB", (len(panels) * (width + gap) + gap, rows * cell + head + gap), "white")
    pen = ImageDraw.Draw(image)
    for place, (name, pictures) in enumerate(panels.items()):
        left = gap + place * (width + gap)
        numbers = table[name]
        pen.text((left, 8), name, fill="black", font_size=18)
        pen.text((left, 33), f"reward {numbers['reward']:.2f}, {numbers['even digits']:.1f} of 5 even digits", fill="#444444", font_size=14)
        for index, picture in enumerate(pictures[: rows * columns]):
            pixels = (picture[0] * 255).round().to(torch.uint8).numpy()
            tile = Image.fromarray(255 - pixels).resize((cell - 2, cell - 2), Image.Resampling.NEAREST)
            image.paste(tile, (left + index % columns * cell, head + index // columns * cell))
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="alignment steps of each objective")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("digits.png"))
    parser.add_argument("--json", type=Path, help="also write the table here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the network is small
    base = DigitsPolicy.from_pretrained("digits", device="cpu")
    target = tilt(class_shares(drawn(base, TREE, 128)), REWARD.values(), BETA)
    policies: dict[str, Policy] = {"base": base}
    for name, objective in OBJECTIVES.items():
        print(f"{name}: {arguments.steps} steps", flush=True)
        policies[name] = align(objective, arguments.steps, arguments.seed)
    table = {name: measure(policy, target) for name, policy in policies.items()}
    print(f"{'':12s}" + "".join(f"{name:>18s}" for name in table["base"]))
    for name, row in table.items():
        print(f"{name:12s}" + "".join(f"{value:18.3f}" for value in row.values()))
    panels = {name: drawn(policy, DeterministicSampler(20, samples=1), 72) for name, policy in policies.items()}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    sheet(panels, table).save(arguments.out)
    print(f"pictures: {arguments.out}")
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
