"""Softmax-TB on the ring over decades of the inverse temperature, for each convention of the log-density.

python benchmarks/temperature_study.py [--seeds 3] [--total 700] [--json FILE]

Beta is nats per unit of reward in all of them: what differs is the gradient, whose edges a "squared" log-density weighs by their noise.
Reward and kept modes are measured as in ring_study.py; intervals are 95 % (t) over seeds.
"""

import argparse
import json
from pathlib import Path

import torch
from ring_study import interval, ring

from diffalign.core import CPS
from diffalign.objectives import SoftmaxTB
from diffalign.policies import NetworkPolicy

DENSITIES = ("mean", "sum", "squared")
BETAS = (0.2, 2.0, 20.0, 200.0)
MODES = (0, 2, 4, 6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--total", type=int, default=700, help="alignment steps")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bases = [ring.trained_base(seed) for seed in range(arguments.seeds)]
    table = []
    print(f"{'density':<10}{'beta':>7}{'reward':>18}{'modes of 4':>16}")
    for density in DENSITIES:
        for beta in BETAS:
            rows = []
            for seed, base in enumerate(bases):
                policy = NetworkPolicy(base.network, base.latent_shape, ring.as_image, CPS(density))
                aligned = ring.align(policy, lambda student, beta=beta: SoftmaxTB(student, beta=beta), MODES, seed, arguments.total)
                rows.append(ring.measure(ring.samples_of(aligned, ring.tree(), 6000), MODES))
            reward, kept = (interval([row[key] for row in rows]) for key in ("reward", "modes"))
            print(f"{density:<10}{beta:>7g}{reward[0]:>10.3f} +- {reward[1]:.3f}{kept[0]:>8.2f} +- {kept[1]:.2f}", flush=True)
            table.append({"density": density, "beta": beta, "seeds": rows})
    if arguments.json:
        arguments.json.write_text(json.dumps({"total": arguments.total, "rows": table}, indent=1))


if __name__ == "__main__":
    main()
