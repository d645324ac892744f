"""Why match a distribution? Eight modes on a ring, four of them rewarded equally; two ways to follow the reward, side by side.

python examples/ring.py [--out ring.png] [--adjacent] [--seed 0] [--json FILE]

A small flow model of the ring is trained from scratch, then aligned by Flow-GRPO and by Softmax-TB. The picture shows samples of the
base, of both, and of the target that Softmax-TB aims at, with the mean reward and the effective number of rewarded modes.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from diffalign import AlignmentLoop
from diffalign.core import CPS, Objective, Policy, Progress, Prompt, Streams, TrajectorySampler
from diffalign.objectives import FlowGRPO, SoftmaxTB
from diffalign.policies import NetworkPolicy
from diffalign.prompts import Prompts
from diffalign.samplers import DeterministicSampler, FixedPlan, TreeSampler

RADIUS, SPREAD, EXTENT = 4.0, 0.3, 8.0
ANGLES = torch.arange(8) * math.pi / 4
MODES = RADIUS * torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)
PROMPT = Prompt("a point on the ring")


class RingNetwork(nn.Module):
    """Velocity of a point in the plane."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 + 8, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )

    def forward(self, points: Tensor, sigma: Tensor) -> Tensor:
        angles = sigma[:, None] * math.pi * torch.tensor([0.5, 1.0, 2.0, 4.0])
        return self.layers(torch.cat([points, angles.sin(), angles.cos()], dim=1))


def as_image(points: Tensor) -> Tensor:
    """[K, 2] -> [K, 3, 1, 1]: rewards see images, so a point is one pixel, its coordinates two of the channels."""
    return nn.functional.pad(points / (2 * EXTENT) + 0.5, (0, 1))[:, :, None, None]


def as_points(images: Tensor) -> Tensor:
    """[K, 3, 1, 1] -> [K, 2]."""
    return (images[:, :2, 0, 0] - 0.5) * 2 * EXTENT


def likes(modes: Sequence[int]) -> Callable[[Tensor, Sequence[Prompt]], Tensor]:
    """A reward without a gradient: 1 within one unit of a rewarded mode, else 0."""

    def on_a_rewarded_mode(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return (torch.cdist(as_points(images), MODES[list(modes)]).amin(dim=1) < 1.0).float()

    return on_a_rewarded_mode


OBJECTIVES: dict[str, Callable[[Policy], Objective]] = {
    "Flow-GRPO": lambda policy: FlowGRPO(policy, kl=0.0),
    "Softmax-TB": lambda policy: SoftmaxTB(policy, beta=20.0),
}


def trained_base(seed: int, steps: int = 2500, batch: int = 512) -> NetworkPolicy:
    """Flow matching on the ring (arXiv:2210.02747)."""
    torch.manual_seed(seed)
    network = RingNetwork()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        clean = MODES[torch.randint(8, (batch,))] + SPREAD * torch.randn(batch, 2)
        noise, sigma = torch.randn(batch, 2), torch.rand(batch)
        velocity = network(torch.lerp(clean, noise, sigma[:, None]), sigma)
        optimizer.zero_grad()
        (velocity - (noise - clean)).square().mean().backward()
        optimizer.step()
        schedule.step()
    return NetworkPolicy(network, (2,), as_image, CPS("mean"))


def tree() -> TrajectorySampler:
    return TreeSampler(steps=8, plan=FixedPlan(splits=(1, 2, 3), branches=3, eta=0.7))


def align(
    policy: Policy,
    objective: Callable[[Policy], Objective],
    modes: Sequence[int],
    seed: int,
    steps: int,
    rate: float = 3e-4,
) -> Policy:
    """A copy of the policy after `steps` steps of 8 prompt groups."""
    student = policy.fork(trainable=True)
    loop = AlignmentLoop(
        objective=objective(student),
        sampler=tree(),
        rewards=likes(modes),
        prompts=Prompts([PROMPT]),
        prompts_per_step=8,
        optimizers={"default": lambda parameters: torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)},
        max_grad_norm=1.0,
        seed=seed,
        check_rows=0,
    )
    loop.run(steps)
    return student


@torch.no_grad()
def samples_of(policy: Policy, sampler: TrajectorySampler, count: int) -> Tensor:
    """At least `count` points [K, 2]."""
    points: list[Tensor] = []
    while sum(map(len, points)) < count:
        condition = policy.encode([PROMPT] * 64)
        points.append(sampler.sample(policy, condition, Progress(0, 1), Streams(10_000 + len(points))).samples)
    return torch.cat(points)


def measure(points: Tensor, modes: Sequence[int]) -> dict[str, float]:
    """Mean reward; the share of samples nearest to a rewarded mode; exp of the entropy of the rewarded samples over those modes."""
    nearest = torch.cdist(points, MODES).argmin(dim=1)
    reward = likes(modes)(as_image(points), [])
    share = torch.bincount(nearest[reward > 0], minlength=8)[list(modes)].double()
    share = share / share.sum().clamp(min=1)
    return {
        "reward": float(reward.mean()),
        "mass": float(torch.isin(nearest, torch.tensor(modes)).double().mean()),
        "modes": math.exp(-float(torch.special.xlogy(share, share).sum())),
    }


def target_of(base_points: Tensor, modes: Sequence[int]) -> Tensor:
    """Samples of the base that are rewarded: the tilt of the base by exp(beta R) for a large beta."""
    return base_points[likes(modes)(as_image(base_points), []) > 0]


def draw(panels: Sequence[tuple[str, Tensor, dict[str, float]]], modes: Sequence[int]) -> Image.Image:
    """One square per panel: rewarded modes in green, the others in grey, samples in blue."""
    side, caption = 320, 64
    sheet = Image.new("RGB", (side * len(panels), side + caption), "white")
    pen = ImageDraw.Draw(sheet)

    def place(point: Sequence[float], column: int) -> tuple[float, float]:
        return column * side + side / 2 + point[0] * side / 13, side / 2 - point[1] * side / 13

    for column, (name, points, numbers) in enumerate(panels):
        for index, mode in enumerate(MODES.tolist()):
            x, y = place(mode, column)
            radius = side / 13
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill="#cdebcf" if index in modes else "#ececec")
        for point in points[:1500].tolist():
            x, y = place(point, column)
            pen.ellipse((x - 1.2, y - 1.2, x + 1.2, y + 1.2), fill="#1f4e9c")
        pen.text((column * side + 14, side + 6), name, fill="black", font_size=17)
        line = f"reward {numbers['reward']:.2f}   effective modes {numbers['modes']:.2f} of {len(modes)}"
        pen.text((column * side + 14, side + 32), line, fill="#444444", font_size=14)
        pen.line((column * side, 0, column * side, side + caption), fill="#bbbbbb")
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("ring.png"))
    parser.add_argument("--adjacent", action="store_true", help="reward four neighbours instead of every second mode")
    parser.add_argument("--total", type=int, default=700, help="alignment steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the table here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # tensors are tiny

    modes = (0, 1, 2, 3) if arguments.adjacent else (0, 2, 4, 6)
    base = trained_base(arguments.seed)
    policies = {"base": base}
    for name, objective in OBJECTIVES.items():
        policies[name] = align(base, objective, modes, arguments.seed, arguments.total)
    panels, table = [], {}
    for name, policy in policies.items():
        points = samples_of(policy, tree(), 6000)
        table[name] = {**measure(points, modes), "ode": measure(samples_of(policy, DeterministicSampler(20, 27), 6000), modes)}
        panels.append((name, points, table[name]))
    wanted = target_of(samples_of(base, tree(), 12000), modes)
    table["target"] = measure(wanted, modes)
    panels.append(("target", wanted, table["target"]))
    print(f"{'':12s} {'reward':>8s} {'mass':>8s} {'modes':>8s}   ODE: {'reward':>8s} {'modes':>8s}")
    for name, row in table.items():
        beside = f"        {row['ode']['reward']:8.3f} {row['ode']['modes']:8.2f}" if "ode" in row else ""
        print(f"{name:12s} {row['reward']:8.3f} {row['mass']:8.3f} {row['modes']:8.2f}{beside}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    draw(panels, modes).save(arguments.out)
    print(arguments.out)
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
