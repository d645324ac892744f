"""The ring over many seeds: what each objective keeps of the rewarded modes, at which reward.

Every objective starts from the same base of a seed, takes the same steps on the same noise, and is measured under the sampler that it was
trained with. "modes" is exp of the entropy of the rewarded samples over the rewarded modes, 4 at best. Intervals are 95 % (t) over seeds;
differences are paired with Softmax-TB seed by seed.

Args:
    seeds: runs of each objective
    total: alignment steps
    adjacent: reward four neighbours instead of every second mode
    only: objectives
    json: also write the numbers here, after every run; those that it holds are not run again
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from benchmarks.intervals import interval, shown
from benchmarks.record import Record
from benchmarks.subjects.examples import ring
from diffalign.core import Objective, Policy
from diffalign.objectives import FlowGRPO, GroupForwardKL, SoftmaxTB

OURS = "Softmax-TB"
OBJECTIVES: dict[str, Callable[[Policy], Objective]] = {
    OURS: ring.OBJECTIVES["Softmax-TB"],
    "Flow-GRPO": ring.OBJECTIVES["Flow-GRPO"],
    "Flow-GRPO, KL in the loss": lambda policy: FlowGRPO(policy, kl=0.1),
    "Flow-GRPO, log-ratio in the reward": lambda policy: FlowGRPO(policy, kl=0.05, kl_in="reward"),
    "Softmax-TB of the release": lambda policy: SoftmaxTB.release_compatible(policy, beta=2.0),
    "GroupForwardKL": lambda policy: GroupForwardKL(policy, beta=20.0),
}


def run(name: str, base: Policy, modes: tuple[int, ...], seed: int, total: int) -> dict[str, float]:
    points = ring.samples_of(ring.align(base, OBJECTIVES[name], modes, seed, total), ring.tree(), 6000)
    row: dict[str, float] = ring.measure(points, modes)
    print(f"seed {seed:2d}  {name:36s} " + "  ".join(f"{key} {value:.3f}" for key, value in row.items()), flush=True)
    return row


def main(
    seeds: int = 20,
    total: int = 700,
    adjacent: bool = False,
    only: tuple[Literal[*OBJECTIVES], ...] = tuple(OBJECTIVES),
    json: Path | None = None,
) -> None:
    modes = (0, 1, 2, 3) if adjacent else (0, 2, 4, 6)
    record = Record(json, {"total": total, "modes": modes})
    runs = {name: record.content.setdefault("runs", {}).setdefault(name, []) for name in only}
    for seed in range(seeds):
        base = functools.cache(functools.partial(ring.trained_base, seed))
        for name, rows in runs.items():
            record.once(rows, seed, lambda name=name, seed=seed, base=base: run(name, base(), modes, seed, total))
    print(f"\n{'':36s} {'reward':>16s} {'modes':>16s} {'modes, paired with ' + OURS:>32s}")
    table = {name: rows[:seeds] for name, rows in runs.items()}
    for name, rows in table.items():
        reward, kept = (shown([row[key] for row in rows], digits) for key, digits in (("reward", 3), ("modes", 2)))
        line = f"{name:36s} {reward:>16s} {kept:>16s}"
        if name != OURS and OURS in table:
            change = interval([row["modes"] - mine["modes"] for row, mine in zip(rows, table[OURS], strict=True)])
            line += f" {change[0]:+24.2f} +- {change[1]:4.2f}"
        print(line)
