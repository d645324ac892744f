"""Where relative Softmax-TB ends: at the tilt of the reference per initial noise, and not at p_ref exp(beta R) / Z.

Four neighbouring modes of the ring are rewarded. The initial noise already leans to one side of the ring, and no update can move it,
so the optimum is E_root[p_ref(. | root) exp(beta R) / Z(root)]. The first table computes both distributions over the eight modes by
Monte Carlo for several numbers of stochastic steps; the second trains a policy and says how far it ends from each.

Args:
    beta: nats per unit of reward
    steps: of training
    seed: of the base and of the training
    json: also write the tables here
"""

from pathlib import Path

import torch
from torch import Tensor

from benchmarks.record import write
from benchmarks.subjects.examples import ring
from diffalign.core import CPS, Policy, Streams
from diffalign.objectives import SoftmaxTB
from diffalign.samplers import Branching, roll_out

MODES = (0, 1, 2, 3)


def distributions(policy: Policy, noisy: tuple[int, ...], beta: float, roots: int, leaves: int) -> dict[str, Tensor]:
    """Shares of the eight modes [8] under the policy, its tilt per root, and its tilt overall, with 8 denoising steps."""
    children = [leaves if step == noisy[0] else 1 for step in range(8)]
    branching = Branching(tuple(children), tuple(0.7 if step in noisy else 0.0 for step in range(8)), roots=roots)
    with torch.no_grad():
        forest = roll_out(policy, policy.encode([ring.PROMPT]), branching, Streams(77))
    points = forest.samples
    weight = (beta * ring.likes(MODES)(ring.as_image(points), []).double()).exp()
    mode = torch.cdist(points, ring.MODES).argmin(dim=1)
    one_hot = torch.nn.functional.one_hot(mode, 8).double()
    by_root = weight.view(roots, leaves)
    per_root = (by_root / by_root.sum(dim=1, keepdim=True)).flatten() / roots
    return {
        "policy": one_hot.mean(dim=0),
        "per root": (one_hot * per_root[:, None]).sum(dim=0),
        "overall": (one_hot * (weight / weight.sum())[:, None]).sum(dim=0),
    }


def divergence(of: Tensor, other: Tensor) -> float:
    """KL(of || other) in nats."""
    return float(torch.special.xlogy(of, of / other.clamp(min=1e-12)).sum())


def main(beta: float = 3.0, steps: int = 3000, seed: int = 0, json: Path | None = None) -> None:
    base = ring.trained_base(seed)
    base.kernel = CPS("sum")
    result: dict[str, dict[str, float]] = {}
    print(f"{'stochastic steps of 8':24s} {'KL(per root || overall)':>24s}")
    for noisy in ((3,), (1, 2, 3), (1, 2, 3, 4, 5), (0, 1, 2, 3), (0, 1, 2, 3, 4, 5, 6)):
        found = distributions(base, noisy, beta, roots=800, leaves=64)
        result[f"stochastic {list(noisy)}"] = {"KL(per root || overall)": divergence(found["per root"], found["overall"])}
        print(f"{list(noisy)!s:24s} {result[f'stochastic {list(noisy)}']['KL(per root || overall)']:24.4f}")
    wanted = distributions(base, (1, 2, 3), beta, roots=2000, leaves=64)
    policy, done = base, 0
    print(f"\n{'trained steps':24s} {'KL(policy || per root)':>24s} {'KL(policy || overall)':>24s}")
    for share, rate in ((0.0, 0.0), (0.5, 3e-4), (0.3, 1e-4), (0.2, 3e-5)):  # the last rates leave no noise of the optimizer
        count = round(share * steps)
        if count:
            reference = base.fork()
            policy = ring.align(
                policy, lambda student, reference=reference: SoftmaxTB(student, reference, beta=beta), MODES, seed + done, count, rate
            )
            done += count
        got = distributions(policy, (1, 2, 3), beta, roots=2000, leaves=64)["policy"]
        row = {"KL(policy || per root)": divergence(got, wanted["per root"]), "KL(policy || overall)": divergence(got, wanted["overall"])}
        result[f"after {done} steps"] = row
        print(f"{done:<24d} {row['KL(policy || per root)']:24.4f} {row['KL(policy || overall)']:24.4f}", flush=True)
    write(json, result)
