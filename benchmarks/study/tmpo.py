"""Every objective on the same handwriting: reward against what is kept of the rewarded digits.

The prompt is "a digit" and the reward a black box: `even` says yes to even digits; `tilt` adds 0.2 to zeros, so that the optimum of a
temperature is a known distribution over digits; `thick` says yes to the thickest third of strokes, whatever the digit is. Every arm starts
from the embedded flow and draws for 8 groups a step from the noise of its seed: trees of 27 leaves, chains, or 27 finished samples of the
deterministic flow for losses that need no path. It is measured on the same further noise: reward, effective number of digits among rewarded
pictures, distance to the nearest real picture, and the divergence of the class shares from the exact tilt of the base by exp(beta R). For
paths the tilt is counted root by root, because the initial noise does not move. A run also counts what it spent up to a measure: network
rows, and seconds of its steps.

Runs that the file holds are not run again. Without --seeds it prints the tables of the file: seeds from 100 on are the search, those
below are reported.

Args:
    arms: objectives
    seeds: runs of each arm and rate
    first: the first seed; 100 begins a search
    steps: of a run
    rates: of learning
    last: share of the rate that is left at the last step; it falls along a cosine, and 1 keeps it
    average: decay of a moving average of the weights, which is measured in their place; 0 measures the weights themselves
    task: what the reward says
    json: the runs, written after each; those that it holds are not run again
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs
import torch
from torch import Tensor

from benchmarks.intervals import shown
from benchmarks.record import RESULTS, Record
from benchmarks.subjects.curve import Curve
from benchmarks.subjects.handwriting import ARMS, ENDS
from diffalign import AlignmentLoop, Prompt
from diffalign.core import (
    CPS,
    Average,
    Cosine,
    Edges,
    Policy,
    Progress,
    Report,
    Reward,
    Streams,
    TrajectoryBatch,
    TrajectorySampler,
    replay_log_prob,
)
from diffalign.digits import ClassReward, DigitsPolicy, ThicknessReward, class_shares, distance_to_real, effective_classes, kl
from diffalign.digits.classes import CLASSES
from diffalign.digits.judge import look
from diffalign.digits.measures import distances_to_real
from diffalign.evaluation import HackingAlarm, PixelFeatures
from diffalign.objectives.path_losses import nats_of
from diffalign.prompts import Prompts
from diffalign.samplers import Branching, TreeSampler
from diffalign.testing import GivenPlan

EVEN = (0, 2, 4, 6, 8)
BETA = {"even": 20.0, "tilt": 5.0, "thick": 20.0}
"""Nats per unit of reward at which the arms with a temperature are compared."""
MEASURED = (75, 150, 300, 600, 1200, 2400, 6000)
"""Steps after which a run is measured."""
NUMBERS = ("rows", "seconds", "reward", "even", "modes", "distance", "from tilt", "nats")
"""Columns of the tables."""
PROMPT = Prompt("a digit")
ROOTS = 200
"""Initial noises at which policies and the target are measured: the same for all, so that what the noises decide cancels."""
SEARCH = 100
"""The first seed of a search for settings."""


def noise_of(seed: int) -> int:
    """The seed of the initial noises at which a run is measured: a search sees others than what is reported."""
    return 78 if seed >= SEARCH else 77


@attrs.frozen
class Thick(Reward):
    """1 for a sure digit whose stroke is among the thickest third of real ones of that digit, else 0."""

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return (ThicknessReward()(images, prompts) > 2 / 3).float()


def reward_of(task: str) -> Reward:
    if task == "thick":
        return Thick()
    return ClassReward(EVEN, {0: 0.2}) if task == "tilt" else ClassReward(EVEN)


@torch.no_grad()
def forests(policy: Policy, sampler: TrajectorySampler, roots: int, noise: int) -> Iterator[TrajectoryBatch]:
    """Samples from the first initial noises of a seed, which are the same for every policy and sampler."""
    for start in range(0, roots, 8):
        yield sampler.sample(policy, policy.encode([PROMPT] * 8), Progress(0, 1), Streams(noise, start))


def tilted(images: Tensor, task: str, beta: float) -> Tensor:
    """Shares [10] of the digits, and of no digit in what is left of the sum 1, when each picture weighs exp(beta R) / Z: [11]."""
    sight = look(images)
    weight = (beta * reward_of(task)(images, [PROMPT] * len(images)).double()).exp()
    digit = torch.where(sight.sure, sight.classes, len(CLASSES))
    return torch.bincount(digit, weight, minlength=len(CLASSES) + 1) / weight.sum()


@torch.no_grad()
def exact_tilt(task: str, beta: float, noise: int, roots: int = ROOTS, leaves: int = 256) -> Tensor:
    """Class shares [10] of the base tilted by exp(beta R) at each initial noise, and of no digit in what is left of the sum 1.

    E_root[p_0(c | root) exp(beta R_c) / Z(root)],        p_0(c | root) counted over leaves of independent noise
    """
    policy = DigitsPolicy.from_pretrained("digits", CPS("mean"), device="cpu")
    wide = TreeSampler(8, GivenPlan(Branching((1, leaves, *(1,) * 6), (0.0, 0.7, 0.7, 0.7, *(0.0,) * 4))))  # the law of TREE's leaves
    total = torch.zeros(11, dtype=torch.float64)
    for forest in forests(policy, wide, roots, noise):
        images = policy.decode(forest.samples)
        for group in range(len(forest.condition)):
            total += tilted(images[forest.group == group], task, beta)
    return (total / roots)[:10]


@torch.no_grad()
def tilt_of_ends(task: str, beta: float, noise: int) -> Tensor:
    """Class shares [10] of the base's finished samples tilted by exp(beta R): the optimum of losses that see no path."""
    policy = DigitsPolicy.from_pretrained("digits", CPS("mean"), device="cpu")
    return tilted(torch.cat([policy.decode(batch.samples) for batch in forests(policy, ENDS, ROOTS, noise)]), task, beta)[:10]


def near(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Distance to the nearest real picture, negated: what the alarm watches beside diversity."""
    return -distances_to_real(images)


def run(arm: str, task: str, seed: int, steps: int, rate: float, last: float, target: Tensor, average: float = 0.0) -> dict[str, Any]:
    """Measures of one run at MEASURED steps, and the alarms of the run."""
    chosen = ARMS[arm]
    policy = DigitsPolicy.from_pretrained("digits", CPS(chosen.density), device="cpu")
    base = policy.fork()
    loop = AlignmentLoop(
        objective=chosen.make(policy, BETA[task]),
        sampler=chosen.sampler,
        rewards=reward_of(task),
        prompts=Prompts([PROMPT]),
        prompts_per_step=8,
        optimizers={"default": lambda parameters: torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)},
        lr_factor=Cosine(1.0, last),
        average=Average(average) if average else None,
        seed=seed,
        check_rows=0,
    )

    def take(loop: AlignmentLoop, report: Report) -> dict[str, Any]:
        row = measured(loop.evaluation_policy(), base, chosen.measured, task, target, noise_of(seed))
        return row | {name: report.metrics[name] for name in ("reference/felt",) if name in report.metrics}

    measures, alarm = Curve(MEASURED, take), HackingAlarm({"near": near}, features=PixelFeatures(), diversity_fall=0.4)
    loop.advance(steps, also=(measures, alarm))
    ended = {name: round(value, 3) for name, value in measures.rows[-1].items() if isinstance(value, float)}
    print(arm, rate, last, average, seed, json.dumps(ended), *(f"{each.kind} at {each.step}" for each in alarm.alarms), flush=True)
    return {"rows": measures.rows, "alarms": [{"kind": each.kind, "step": each.step} for each in alarm.alarms]}


@torch.no_grad()
def measured(policy: Policy, base: Policy, sampler: TrajectorySampler, task: str, target: Tensor, noise: int) -> dict[str, Any]:
    """Numbers of a policy under a sampler, at the initial noises at which the target was counted."""
    parts, drift = [], []
    for forest in forests(policy, sampler, ROOTS, noise):
        parts.append(policy.decode(forest.samples))
        edges = Edges.of(forest)
        if len(edges.child):
            nats = nats_of(policy.kernel, forest, edges)
            ratio = nats * (replay_log_prob(policy, forest, edges) - replay_log_prob(base, forest, edges))
            drift.append(forest.path_sum(ratio.new_zeros(len(forest.latents)).index_copy(0, edges.child, ratio)))
    images = torch.cat(parts)
    shares, reward = class_shares(images), reward_of(task)(images, [PROMPT] * len(images))
    found = {
        "reward": float(reward.mean()),
        "shares": shares.tolist(),
        "modes": effective_classes(class_shares(images[reward > 0])),
        "distance": distance_to_real(images),
        "from tilt": kl(target, shares),
    }
    if task != "thick":
        found |= {"even": float(shares[list(EVEN)].sum()), "within": kl(_only(target, EVEN), _only(shares, EVEN))}
    return found | ({"nats": float(torch.cat(drift).mean())} if drift else {})


def _only(shares: Tensor, classes: Iterable[int]) -> Tensor:
    """Shares of some digits, 0 for all others."""
    kept = torch.zeros_like(shares)
    kept[list(classes)] = shares[list(classes)]
    return kept


def table(runs: Sequence[Mapping[str, Any]], search: bool) -> str:
    """One line a task, arm, rate and step, of the seeds that are reported or of those of the search."""
    groups: dict[tuple[str, str, float, float, float, int, int], dict[int, dict[str, float]]] = {}
    for entry in sorted((entry for entry in runs if (entry["seed"] >= SEARCH) == search), key=lambda entry: int(entry["steps"])):
        of = 0 if entry["last"] == 1 else entry["steps"]  # at one rate a longer run of a seed begins with the same steps, and counts once
        for row in entry["rows"]:
            key = (entry["task"], entry["arm"], entry["rate"], entry["last"], entry.get("average", 0.0), of, row["step"])
            groups.setdefault(key, {})[entry["seed"]] = row
    lines = []
    for (task, arm, rate, last, average, of, step), by_seed in sorted(groups.items()):
        rows = list(by_seed.values())
        known_of_all = [name for name in NUMBERS if all(name in row for row in rows)]
        numbers = "  ".join(f"{name} {shown([row[name] for row in rows])}" for name in known_of_all)
        if "nats" in known_of_all:
            numbers += f"  J {shown([BETA[task] * row['reward'] - row['nats'] for row in rows])}"
        falling = f"to {last * rate:.0e} in {of:4d}" if of else f"average {average:g}" if average else ""
        lines.append(f"{task:5s} {arm:42s} {rate:.0e} {falling:16s} {step:5d} n={len(rows)}  {numbers}")
    return "\n".join(lines)


def main(
    arms: tuple[Literal[*ARMS], ...] = tuple(ARMS),
    seeds: int = 0,
    first: int = 0,
    steps: int = 600,
    rates: tuple[float, ...] = (1e-4,),
    last: float = 1.0,
    average: float = 0.0,
    task: Literal["even", "tilt", "thick"] = "even",
    json: Path = RESULTS / "digits_study.json",
) -> None:
    record = Record(json)
    runs, targets = (record.content.setdefault(name, empty) for name, empty in (("runs", []), ("targets", {})))
    for seed, arm, rate in itertools.product(range(first, first + seeds), arms, rates):
        settings = {"task": task, "arm": arm, "rate": rate, "last": last, "seed": seed, "steps": steps}
        key, count = (f"{task}, ends", tilt_of_ends) if ARMS[arm].on_ends else (task, exact_tilt)
        key, noise = f"{key}, search" if seed >= SEARCH else key, noise_of(seed)
        shares = record.once(targets, key, lambda count=count, noise=noise: count(task, BETA[task], noise).tolist())
        target = torch.tensor(shares, dtype=torch.float64)
        if average:
            settings["average"] = average
        record.run("averages" if average else "runs", settings, lambda settings=settings, target=target: run(**settings, target=target))
    runs = [*runs, *record.content.get("averages", [])]
    print(f"search\n{table(runs, True)}\n\nreported\n{table(runs, False)}")
