"""Four steps instead of forty, then a reward without a gradient: distillation and TDM-R1 on the ring of eight modes.

python examples/ring_tdm_r1.py [--out ring_tdm_r1.png] [--pretrain 2500] [--distil 400] [--reinforce 800] [--seed 0] [--json FILE]

A flow model of the ring is trained from scratch, distilled into a student of four steps (Trajectory Distribution Matching), and the
student is then reinforced by a yes-or-no reward for every second mode (TDM-R1). The picture shows samples of all of them.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ring import EXTENT, MODES, PROMPT, draw, likes, measure, trained_base
from torch import Tensor, nn

from diffalign import AlignmentLoop
from diffalign.core import Objective, Policy, Progress, ShiftedGrid, Streams, TrajectorySampler
from diffalign.core.average import Average
from diffalign.objectives import SurrogateReward, TrajectoryDistributionMatching
from diffalign.objectives.few_step import CleanerStages, RatioClip, ShareMix
from diffalign.policies import TDMPolicy
from diffalign.prompts import Prompts
from diffalign.samplers import DeterministicSampler

REWARDED = (0, 2, 4, 6)


def adam(rate: float, momentum: float = 0.0) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.AdamW(parameters, lr=rate, betas=(momentum, 0.999), weight_decay=0.0)


def trained(
    objective: Objective,
    optimizers: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]],
    total: int,
    seed: int,
    sampler: TrajectorySampler | None = None,
) -> Policy:
    """The moving average of the student over `total` steps of two groups of 64 samples."""
    loop = AlignmentLoop(
        objective=objective,
        sampler=sampler or DeterministicSampler(steps=4, samples=64),
        rewards=likes(REWARDED),
        prompts=Prompts([PROMPT]),
        prompts_per_step=2,
        optimizers=optimizers,
        average=Average(decay=0.99),
        seed=seed,
        check_rows=0,
    )
    loop.run(total)
    return loop.evaluation_policy()


def distilled(base: Policy, total: int, seed: int) -> Policy:
    """A student of four steps with the base's distribution."""
    student = TDMPolicy(base.fork(trainable=True), steps=4, grid=ShiftedGrid(3.0))
    objective = TrajectoryDistributionMatching(student, teacher=base.fork())
    return trained(objective, {"fake": adam(2e-3), "generator": adam(5e-4)}, total, seed)


def reinforced(base: Policy, student: Policy, total: int, seed: int, sampler: TrajectorySampler | None = None, **changes: object) -> Policy:
    """The student after TDM-R1. Errors are in units of the ring, so the limits of the trust region are wider than for images.

    Args:
        base, student: the teacher; where it starts
        total, seed: of the run
        sampler: of its trajectories; None is deterministic
        changes: other components of the objective
    """
    settings: dict[str, Any] = {
        "mix": ShareMix(0.15),
        "trust_region": RatioClip(0.1),
        "runaway": 2.0,
        "surrogate_regularization": 0.02,
        "reward_floor": 0.0,
        "surrogate_floor": 0.0,
        "surrogate_stages": CleanerStages(3),
    }
    objective = SurrogateReward(student.fork(trainable=True), teacher=base.fork(), **(settings | changes))
    return trained(objective, {"surrogate": adam(1e-3, 0.9), "fake": adam(2e-3), "generator": adam(2.5e-4)}, total, seed, sampler)


@torch.no_grad()
def points_of(policy: Policy, steps: int, count: int = 6000) -> Tensor:
    """Samples [count, 2]."""
    sampler = DeterministicSampler(steps=steps, samples=count)
    return sampler.sample(policy, policy.encode([PROMPT]), Progress(0, 1), Streams(10_000)).samples


def measured(points: Tensor) -> dict[str, float]:
    """Reward, mass and effective modes, the distance to the nearest mode (0.42 for exact modes), and the smallest share of any mode."""
    distance, nearest = torch.cdist(points, MODES).min(dim=1)
    share = torch.bincount(nearest, minlength=8)[list(REWARDED)] / len(points)
    return {**measure(points, REWARDED), "distance": float(distance.square().mean().sqrt()), "smallest": float(share.min())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("ring_tdm_r1.png"))
    parser.add_argument("--pretrain", type=int, default=2500, help="steps of the base's training")
    parser.add_argument("--distil", type=int, default=400, help="steps of distillation")
    parser.add_argument("--reinforce", type=int, default=800, help="steps of TDM-R1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the table here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # tensors are tiny

    start = time.process_time()
    base = trained_base(arguments.seed, arguments.pretrain).fork()
    student = distilled(base, arguments.distil, arguments.seed)
    after = reinforced(base, student, arguments.reinforce, arguments.seed)
    samples = {
        "base, 40 steps": points_of(base, 40),
        "base, 4 steps": points_of(TDMPolicy(base, 4, ShiftedGrid(3.0)), 4),
        "TDM, 4 steps": points_of(student, 4),
        "TDM-R1, 4 steps": points_of(after, 4),
    }
    table = {name: measured(points) for name, points in samples.items()}
    print(f"{'':18s} {'reward':>8s} {'mass':>8s} {'modes':>8s} {'smallest':>8s} {'distance':>8s}")
    for name, row in table.items():
        print(f"{name:18s} " + " ".join(f"{row[key]:8.3f}" for key in ("reward", "mass", "modes", "smallest", "distance")))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    inside = {name: points[points.abs().amax(dim=1) < EXTENT] for name, points in samples.items()}
    draw([(name, points, table[name]) for name, points in inside.items()], REWARDED).save(arguments.out)
    print(f"{arguments.out}, {time.process_time() - start:.0f} s of processor time")
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
