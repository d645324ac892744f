"""Solvers of the flow on handwriting: distance of their ends to the exact one, at equal network evaluations.

The distance is the root mean square over pixels and samples of the embedded digits, from the same noise, to the ends of 100 steps of the
midpoint rule. It says how few evaluations a rollout may take where its ends alone are used.

Args:
    samples: samples of the prompt "a digit"
    evaluations: network evaluations of a sample, even numbers
"""

import torch

from diffalign import Prompt
from diffalign.core import Progress, Streams
from diffalign.digits import DigitsPolicy
from diffalign.samplers import AdamsBashforth, DeterministicSampler, DPMSolver, Heun, Midpoint
from diffalign.samplers.solvers import Solver

SOLVERS: dict[str, Solver | None] = {
    "Euler": None,
    "Heun": Heun(),
    "Midpoint": Midpoint(),
    "AdamsBashforth": AdamsBashforth(),
    "DPMSolver": DPMSolver(),
}


@torch.no_grad()
def main(samples: int = 64, evaluations: tuple[int, ...] = (6, 10, 20, 40)) -> None:
    policy = DigitsPolicy.from_pretrained("digits", device="cpu")
    condition = policy.encode([Prompt("a digit")])

    def ends(solver: Solver | None, steps: int) -> torch.Tensor:
        sampler = DeterministicSampler(steps, samples, solver=solver)
        return sampler.sample(policy, condition, Progress(0, 1), Streams(5)).samples

    exact = ends(Midpoint(), 100)
    print(f"{'solver':16s}" + "".join(f"{count:>8d}" for count in evaluations))
    for name, solver in SOLVERS.items():
        line = []
        for count in evaluations:
            steps = max(steps for steps in range(1, count + 1) if sum(solver.evaluations(steps) if solver else (1,) * steps) <= count)
            line.append(float((ends(solver, steps) - exact).square().mean().sqrt()))
        print(f"{name:16s}" + "".join(f"{value:8.4f}" for value in line), flush=True)
