"""The ring over many seeds: what each objective keeps of the rewarded modes, at which reward.

python benchmarks/ring_study.py [--seeds 20] [--total 700] [--json FILE]

Every objective starts from the same base of a seed, takes the same steps on the same noise, and is measured under the sampler that it was
trained with. "modes" is exp of the entropy of the rewarded samples over the rewarded modes, 4 at best. Intervals are 95 % (t) over seeds;
differences are paired with Softmax-TB seed by seed.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from diffalign.core import Objective, Policy
from diffalign.objectives import FlowGRPO, GroupForwardKL, SoftmaxTB

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import ring

T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 8: 2.36, 10: 2.26, 12: 2.20, 16: 2.13, 20: 2.09}
"""Two-sided 95 % quantiles of Student's t by number of values."""

OURS = "Softmax-TB"
OBJECTIVES: dict[str, Callable[[Policy], Objective]] = {
    OURS: ring.OBJECTIVES["Softmax-TB"],
    "Flow-GRPO": ring.OBJECTIVES["Flow-GRPO"],
    "Flow-GRPO, KL in the loss": lambda policy: FlowGRPO(policy, kl=0.1),
    "Flow-GRPO, log-ratio in the reward": lambda policy: FlowGRPO(policy, kl=0.05, kl_in="reward"),
    "Softmax-TB of the release": lambda policy: SoftmaxTB.release_compatible(policy, beta=2.0),
    "GroupForwardKL": lambda policy: GroupForwardKL(policy, beta=20.0),
}


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width."""
    if len(values) < 2:
        return values[0], math.nan
    quantile = next(T_95[count] for count in sorted(T_95, reverse=True) if count <= len(values))
    return statistics.mean(values), quantile * statistics.stdev(values) / math.sqrt(len(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--total", type=int, default=700, help="alignment steps")
    parser.add_argument("--adjacent", action="store_true", help="reward four neighbours instead of every second mode")
    parser.add_argument("--only", nargs="*", choices=list(OBJECTIVES), help="some of the objectives")
    parser.add_argument("--json", type=Path, help="also write the numbers here, after every seed; seeds that it holds are not run again")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    modes = (0, 1, 2, 3) if arguments.adjacent else (0, 2, 4, 6)
    chosen = {name: make for name, make in OBJECTIVES.items() if not arguments.only or name in arguments.only}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    if arguments.json and arguments.json.exists():
        before = json.loads(arguments.json.read_text())
        if (before["total"], tuple(before["modes"]), list(before["runs"])) != (arguments.total, modes, list(chosen)):
            parser.error(f"{arguments.json} holds another study; give another file")
        runs = before["runs"]
    for seed in range(len(next(iter(runs.values()))), arguments.seeds):
        base = ring.trained_base(seed)
        for name, make in chosen.items():
            points = ring.samples_of(ring.align(base, make, modes, seed, arguments.total), ring.tree(), 6000)
            runs[name].append(ring.measure(points, modes))
            print(f"seed {seed:2d}  {name:36s} " + "  ".join(f"{key} {value:.3f}" for key, value in runs[name][-1].items()), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps({"total": arguments.total, "modes": modes, "runs": runs}, indent=1))
    print(f"\n{'':36s} {'reward':>16s} {'modes':>16s} {'modes, paired with ' + OURS:>32s}")
    for name, rows in runs.items():
        reward, kept = (interval([row[key] for row in rows]) for key in ("reward", "modes"))
        line = f"{name:36s} {reward[0]:7.3f} +- {reward[1]:5.3f} {kept[0]:7.2f} +- {kept[1]:5.2f}"
        if name != OURS and OURS in runs:
            change = interval([row["modes"] - mine["modes"] for row, mine in zip(rows, runs[OURS], strict=True)])
            line += f" {change[0]:+24.2f} +- {change[1]:4.2f}"
        print(line)


if __name__ == "__main__":
    main()
