"""Softmax-TB on the ring over decades of the inverse temperature, for each convention of the log-density.

Beta is nats per unit of reward in all of them: what differs is the gradient, whose edges a "squared" log-density weighs by their noise.
Reward and kept modes are measured as in the study of the ring; intervals are 95 % (t) over seeds.

Args:
    seeds: runs of each density and beta
    total: alignment steps
    json: also write the numbers here, after every run; those that it holds are not run again
"""

import functools
import itertools
from pathlib import Path

from benchmarks.intervals import shown
from benchmarks.record import Record
from benchmarks.subjects.examples import ring
from diffalign.core import CPS
from diffalign.objectives import SoftmaxTB
from diffalign.policies import NetworkPolicy

DENSITIES = ("mean", "sum", "squared")
BETAS = (0.2, 2.0, 20.0, 200.0)
MODES = (0, 2, 4, 6)


def run(base: NetworkPolicy, density: str, beta: float, seed: int, total: int) -> dict[str, float]:
    policy = NetworkPolicy(base.network, base.latent_shape, ring.as_image, CPS(density))
    aligned = ring.align(policy, lambda student: SoftmaxTB(student, beta=beta), MODES, seed, total)
    row: dict[str, float] = ring.measure(ring.samples_of(aligned, ring.tree(), 6000), MODES)
    return row


def main(seeds: int = 3, total: int = 700, json: Path | None = None) -> None:
    record, base = Record(json, {"total": total}), functools.cache(ring.trained_base)
    print(f"{'density':<10}{'beta':>7}{'reward':>18}{'modes of 4':>16}")
    for density, beta in itertools.product(DENSITIES, BETAS):
        rows = record.run("rows", {"density": density, "beta": beta}, lambda: {"seeds": []})["seeds"]
        for seed in range(seeds):
            record.once(rows, seed, lambda density=density, beta=beta, seed=seed: run(base(seed), density, beta, seed, total))
        reward, kept = (shown([row[key] for row in rows[:seeds]], digits) for key, digits in (("reward", 3), ("modes", 2)))
        print(f"{density:<10}{beta:>7g}{reward:>18s}{kept:>16s}", flush=True)
