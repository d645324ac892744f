"""One temperature in 2 to 65,536 dimensions: beta is in nats, so equal numbers lead to equal policies.

A mixture of eight Gaussians on a ring in the first two of D latent numbers, of which the weights alone are trained (so that the number of
trained numbers is the same in every D), by Softmax-TB with a kernel of density "mean" and a reward that says yes to every second mode.
Printed: reward, KL to the reference in nats, and `reference/felt` at the end. Below, the same with beta per dimension as it was before
temperatures were nats: beta times D nats.

Args:
    sizes: numbers of a latent
    betas: nats per unit of reward; beside them that of each size in the convention before
    total: steps of a run
    seed: of every run
    json: also write the rows here, after each; those that it holds are not run again
"""

from pathlib import Path

import torch
from torch import Tensor

from benchmarks.record import Record
from benchmarks.subjects.examples import ring as circle
from diffalign import AlignmentLoop, Prompt
from diffalign.core import CPS, Progress
from diffalign.objectives import SoftmaxTB
from diffalign.policies import GaussianMixturePolicy
from diffalign.prompts import Prompts
from diffalign.samplers import FixedPlan, TreeSampler


class Ring(GaussianMixturePolicy):
    """A mixture whose pictures show the first two coordinates."""

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents[:, :2])


def ring(size: int) -> Ring:
    """Eight modes, all but the first two coordinates 0; the weights alone are trained."""
    means = torch.zeros(8, size)
    means[:, :2] = circle.MODES
    policy = Ring(means, 0.3, kernel=CPS("mean"))
    policy.means.requires_grad_(False)
    return policy


def even(images: Tensor, prompts: list[Prompt]) -> Tensor:
    near = torch.cdist(circle.as_points(images), circle.MODES).min(dim=1)
    return ((near.indices % 2 == 0) & (near.values < 1.5)).float()


def run(size: int, beta: float, total: int, seed: int) -> dict[str, float]:
    """Means over the last quarter of a run."""
    loop = AlignmentLoop(
        SoftmaxTB(ring(size), beta=beta),
        TreeSampler(8, FixedPlan((0, 1), branches=3, eta=0.9)),
        even,
        Prompts([Prompt("a point")]),
        prompts_per_step=2,
        optimizers={"default": lambda parameters: torch.optim.Adam(parameters, lr=0.1)},
        seed=seed,
        check_rows=0,
        chunk=4096,
    )
    metrics = [loop.step(loop.prompts.draw(step, 2), Progress(step, total, loop.reward)).metrics for step in range(total)]
    last = metrics[-(total // 4) :]
    names = {"reward": "reward", "kl": "log_ratio/reference", "felt": "reference/felt"}
    return {short: sum(step[name] for step in last) / len(last) for short, name in names.items()}


def main(
    sizes: tuple[int, ...] = (2, 64, 2048, 65536),
    betas: tuple[float, ...] = (1.0, 5.0, 20.0, 100.0),
    total: int = 100,
    seed: int = 0,
    json: Path | None = None,
) -> None:
    record = Record(json, {"total": total, "seed": seed})
    print(f"{'D':>6} {'beta':>12} {'reward':>8} {'KL, nats':>9} {'felt':>10}")
    for size in sizes:
        for beta in [*betas, 4.0 * size]:
            settings = {"size": size, "beta": beta}
            row = record.run("rows", settings, lambda settings=settings: run(**settings, total=total, seed=seed))
            print(f"{size:>6} {beta:>12g} {row['reward']:>8.3f} {row['kl']:>9.3f} {row['felt']:>10.5f}", flush=True)
