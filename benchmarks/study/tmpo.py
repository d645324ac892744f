"""Every objective on the same handwriting: reward against what is kept of the rewarded digits.

The prompt is "a digit" and the reward a black box: `even` says yes to even digits; `tilt` adds 0.2 to zeros, so that the optimum of a
temperature is a known distribution over digits. Every arm starts from the embedded flow, draws the same trees of 27 leaves for 8 groups a
step from the noise of its seed, and is measured under the sampler that it was trained with, on the same further noise: reward, effective
classes among the five even ones, distance to the nearest real picture, and the divergence of the class shares from the exact tilt of the
base by exp(beta R), root by root, because the initial noise does not move.

Runs that the file holds are not run again. Without --seeds it prints the tables of the file: seeds from 100 on are the search, those
below are reported.

Args:
    arms: objectives
    seeds: runs of each arm and rate
    first: the first seed; 100 begins a search
    steps: of a run
    rates: of learning
    task: what the reward says
    json: the runs, written after each; those that it holds are not run again
"""

import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.intervals import shown
from benchmarks.record import RESULTS, Record
from benchmarks.subjects.curve import Curve
from diffalign import AlignmentLoop, Prompt
from diffalign.core import CPS, Edges, Objective, Policy, Progress, Report, Streams, TrajectoryBatch, replay_log_prob
from diffalign.digits import ClassReward, DigitsPolicy, class_shares, distance_to_real, effective_classes, kl
from diffalign.digits.measures import distances_to_real
from diffalign.evaluation import HackingAlarm
from diffalign.objectives import (
    AWM,
    CRD,
    DGPO,
    RAM,
    DiffusionNFT,
    ELBOGroupForwardKL,
    ELBOPolicyGradient,
    ELBOSoftmaxTB,
    FlowGRPO,
    GroupForwardKL,
    SoftmaxTB,
)
from diffalign.objectives.path_losses import nats_of
from diffalign.prompts import Prompts
from diffalign.samplers import Branching, DeterministicSampler, FixedPlan, Midpoint, TreeSampler
from diffalign.testing import GivenPlan

EVEN = (0, 2, 4, 6, 8)
BETA = {"even": 20.0, "tilt": 5.0}
"""Nats per unit of reward at which the arms with a temperature are compared."""
SAMPLER = TreeSampler(8, FixedPlan((1, 2, 3), branches=3, eta=0.7))
ENDS = DeterministicSampler(8, samples=27)
SOLVED = DeterministicSampler(4, samples=27, solver=Midpoint())
"""As many network evaluations as ENDS."""
MEASURED = (150, 300, 600, 1200, 2400, 6000)
"""Steps after which a run is measured."""
PROMPT = Prompt("a digit")
ROOTS = 200
"""Initial noises at which policies and the target are measured: the same for all, so that what the noises decide cancels."""
SEARCH = 100
"""The first seed of a search for settings."""

Make = Callable[[Policy, float], Objective]
ARMS: Mapping[str, tuple[str, Any, Make]] = {
    # name: (density, sampler, objective of a policy and a beta)
    "softmax-tb": ("mean", SAMPLER, lambda policy, beta: SoftmaxTB(policy, beta=beta)),
    "softmax-tb, level weights": ("mean", SAMPLER, lambda policy, beta: SoftmaxTB(policy, beta=beta, level_weights=True)),
    "softmax-tb, squared": ("mean", SAMPLER, lambda policy, beta: SoftmaxTB(policy, beta=beta, loss="squared")),
    "softmax-tb of the release": ("squared", SAMPLER, lambda policy, beta: SoftmaxTB.release_compatible(policy)),
    "group forward kl": ("mean", SAMPLER, lambda policy, beta: GroupForwardKL(policy, beta=beta)),
    "flow-grpo": ("mean", SAMPLER, lambda policy, beta: FlowGRPO(policy, kl=0.0)),
    "flow-grpo, kl 0.3": ("mean", SAMPLER, lambda policy, beta: FlowGRPO(policy, kl=0.3)),
    "flow-grpo, kl 0.1": ("mean", SAMPLER, lambda policy, beta: FlowGRPO(policy, kl=0.1)),
    "flow-grpo, kl 0.03": ("mean", SAMPLER, lambda policy, beta: FlowGRPO(policy, kl=0.03)),
    "flow-grpo, not standardised, kl 1 / beta": ("mean", SAMPLER, lambda policy, beta: FlowGRPO(policy, kl=1 / beta, standardize=False)),
    "flow-grpo, log-ratio in the reward": (
        "mean",
        SAMPLER,
        lambda policy, beta: FlowGRPO(policy, kl=1 / beta, kl_in="reward", standardize=False),
    ),
    "diffusion-nft": ("mean", ENDS, lambda policy, beta: DiffusionNFT(policy)),
    "dgpo": ("mean", ENDS, lambda policy, beta: DGPO(policy)),
    "awm": ("mean", ENDS, lambda policy, beta: AWM(policy)),
    "awm, kl 0.1": ("mean", ENDS, lambda policy, beta: AWM(policy, kl=0.1)),
    "crd": ("mean", ENDS, lambda policy, beta: CRD(policy)),
    "crd, kl 0.01": ("mean", ENDS, lambda policy, beta: CRD(policy, kl=0.01)),
    "ram": ("mean", ENDS, lambda policy, beta: RAM(policy, beta=beta)),
    "ram, beta 1": ("mean", ENDS, lambda policy, beta: RAM(policy)),
    "elbo policy gradient": ("mean", ENDS, lambda policy, beta: ELBOPolicyGradient(policy, kl=1 / beta)),
    "elbo softmax-tb": ("mean", ENDS, lambda policy, beta: ELBOSoftmaxTB(policy, beta=beta)),
    "elbo group forward kl": ("mean", ENDS, lambda policy, beta: ELBOGroupForwardKL(policy, beta=beta)),
    "elbo softmax-tb, 4 midpoint steps": ("mean", SOLVED, lambda policy, beta: ELBOSoftmaxTB(policy, beta=beta)),
}


def reward_of(task: str) -> ClassReward:
    return ClassReward(EVEN, {0: 0.2}) if task == "tilt" else ClassReward(EVEN)


@torch.no_grad()
def forests(policy: Policy, sampler: Any, roots: int) -> Iterator[TrajectoryBatch]:
    """Samples from the first initial noises of the study, which are the same for every policy and sampler."""
    for start in range(0, roots, 8):
        yield sampler.sample(policy, policy.encode([PROMPT] * 8), Progress(0, 1), Streams(77, start))


@torch.no_grad()
def exact_tilt(task: str, beta: float, roots: int = ROOTS, leaves: int = 256) -> Tensor:
    """Class shares [10] of the base tilted by exp(beta R) at each initial noise, and of no digit in what is left of the sum 1.

    E_root[p_0(c | root) exp(beta R_c) / Z(root)],        p_0(c | root) counted over leaves of independent noise
    """
    policy = DigitsPolicy.from_pretrained("digits", CPS("mean"), device="cpu")
    reward = torch.cat([reward_of(task).values(), torch.zeros(1, dtype=torch.float64)])
    wide = TreeSampler(8, GivenPlan(Branching((1, leaves, *(1,) * 6), (0.0, 0.7, 0.7, 0.7, *(0.0,) * 4))))  # the law of SAMPLER's leaves
    total = torch.zeros(11, dtype=torch.float64)
    for forest in forests(policy, wide, roots):
        images = policy.decode(forest.samples)
        for group in range(len(forest.condition)):
            shares = class_shares(images[forest.group == group])
            base = torch.cat([shares, 1 - shares.sum(dim=0, keepdim=True)]).clamp(min=0)
            weight = base * (beta * reward).exp()
            total += weight / weight.sum()
    return (total / roots)[:10]


def near(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Distance to the nearest real picture, negated: what the alarm watches beside diversity."""
    return -distances_to_real(images)


def run(arm: str, task: str, seed: int, steps: int, rate: float, target: Tensor) -> dict[str, Any]:
    """Measures of one run at MEASURED steps, and the alarms of the run."""
    density, sampler, make = ARMS[arm]
    policy = DigitsPolicy.from_pretrained("digits", CPS(density), device="cpu")
    base = policy.fork()
    loop = AlignmentLoop(
        objective=make(policy, BETA[task]),
        sampler=sampler,
        rewards=reward_of(task),
        prompts=Prompts([PROMPT]),
        prompts_per_step=8,
        optimizers={"default": lambda parameters: torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)},
        seed=seed,
        check_rows=0,
    )
    begun = time.perf_counter()

    def take(loop: AlignmentLoop, report: Report) -> dict[str, Any]:
        row = {"seconds": time.perf_counter() - begun, **measured(policy, base, sampler, task, target)}
        return row | {name: report.metrics[name] for name in ("reference/felt",) if name in report.metrics}

    measures, alarm = Curve(MEASURED, take), HackingAlarm({"near": near})
    loop.advance(steps, also=(measures, alarm))
    last = {name: round(value, 3) for name, value in measures.rows[-1].items() if isinstance(value, float)}
    print(arm, rate, seed, json.dumps(last), *(f"{each.kind} at {each.step}" for each in alarm.alarms), flush=True)
    return {"rows": measures.rows, "alarms": [{"kind": each.kind, "step": each.step} for each in alarm.alarms]}


@torch.no_grad()
def measured(policy: Policy, base: Policy, sampler: Any, task: str, target: Tensor) -> dict[str, Any]:
    """Numbers of a policy under its sampler, at the initial noises at which the target was counted."""
    parts, drift = [], []
    for forest in forests(policy, sampler, ROOTS):
        parts.append(policy.decode(forest.samples))
        edges = Edges.of(forest)
        if len(edges.child):
            nats = nats_of(policy.kernel, forest, edges)
            ratio = nats * (replay_log_prob(policy, forest, edges) - replay_log_prob(base, forest, edges))
            drift.append(forest.path_sum(ratio.new_zeros(len(forest.latents)).index_copy(0, edges.child, ratio)))
    images = torch.cat(parts)
    shares = class_shares(images)
    even = shares[list(EVEN)]
    found = {
        "reward": float(reward_of(task)(images, [PROMPT] * len(images)).mean()),
        "even": float(even.sum()),
        "shares": shares.tolist(),
        "modes": effective_classes(shares, EVEN),
        "distance": distance_to_real(images),
        "from tilt": kl(target, shares),
        "within": kl(_only(target, EVEN), _only(shares, EVEN)),
    }
    return found | ({"nats": float(torch.cat(drift).mean())} if drift else {})


def _only(shares: Tensor, classes: Iterable[int]) -> Tensor:
    """Shares of some digits, 0 for all others."""
    kept = torch.zeros_like(shares)
    kept[list(classes)] = shares[list(classes)]
    return kept


def table(runs: Sequence[Mapping[str, Any]], search: bool) -> str:
    """One line a task, arm, rate and step, of the seeds that are reported or of those of the search."""
    groups: dict[tuple[str, str, float, int], dict[int, dict[str, float]]] = {}
    for entry in sorted((entry for entry in runs if (entry["seed"] >= SEARCH) == search), key=lambda entry: int(entry["steps"])):
        for row in entry["rows"]:  # a longer run of a seed begins with the same steps, and counts once
            groups.setdefault((entry["task"], entry["arm"], entry["rate"], row["step"]), {})[entry["seed"]] = row
    lines = []
    for (task, arm, rate, step), by_seed in sorted(groups.items()):
        rows = list(by_seed.values())
        known_of_all = [name for name in ("even", "modes", "distance", "from tilt", "nats") if all(name in row for row in rows)]
        numbers = "  ".join(f"{name} {shown([row[name] for row in rows])}" for name in known_of_all)
        if "nats" in known_of_all:
            numbers += f"  J {shown([BETA[task] * row['reward'] - row['nats'] for row in rows])}"
        lines.append(f"{task:5s} {arm:42s} {rate:.0e} {step:5d} n={len(rows)}  {numbers}")
    return "\n".join(lines)


def main(
    arms: tuple[Literal[*ARMS], ...] = tuple(ARMS),
    seeds: int = 0,
    first: int = 0,
    steps: int = 600,
    rates: tuple[float, ...] = (1e-4,),
    task: Literal["even", "tilt"] = "even",
    json: Path = RESULTS / "digits_study.json",
) -> None:
    record = Record(json)
    runs, targets = (record.content.setdefault(name, empty) for name, empty in (("runs", []), ("targets", {})))
    for seed, arm, rate in itertools.product(range(first, first + seeds), arms, rates):
        settings = {"task": task, "arm": arm, "rate": rate, "seed": seed, "steps": steps}
        target = torch.tensor(record.once(targets, task, lambda: exact_tilt(task, BETA[task]).tolist()), dtype=torch.float64)
        record.run("runs", settings, lambda settings=settings, target=target: run(**settings, target=target))
    print(f"search\n{table(runs, True)}\n\nreported\n{table(runs, False)}")
