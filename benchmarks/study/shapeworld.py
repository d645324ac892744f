"""Every objective on ShapeWorld: reward against what is kept of the diversity of right pictures.

Every arm is the run file `shapeworld_tmpo` with another objective or sampler: its base, prompts and network rows. `--groups 32` draws 288
pictures a step, for a GPU: with `--device cuda --workers 8` at most five minutes an arm and seed; on two cores 10 groups take as long.
Measured on held-out counts, `--samples` pictures of each from noise that is the same for all arms of a seed, after `--curve` steps too:
reward, share of exact pictures, L-GMD of all pictures (blur counts there as diversity), and of the exact ones alone L-GMD within a prompt,
and the effective number of the 16 fields of the picture that their shapes stand in. A search is measured on the first of these prompts,
what is reported on the next ones.
`--taste` trains on `UpperHalf` instead, which no prompt mentions and many pictures fulfil: share of pictures with it, and the diversity of
those alone. What a policy keeps of all the pictures that fulfil it, beside the count that the prompt asks for, tells methods apart.

Runs that the file holds are not run again. Without --seeds it prints the tables of the file: seeds from 100 on are the search, those
below are reported.

Args:
    arms: objectives and samplers, or the base as it is, with and without guidance
    seeds: runs of each arm and rate
    first: the first seed; 100 begins a search
    steps: of a run
    groups: prompt groups of a step
    rates: of learning
    prompts: held-out prompts, as many for the search as for what is reported
    samples: of each
    curve: steps at which a run is measured before its end
    taste: another trained reward, whose rows are kept apart
    device: of the network
    workers: processes that score; 0 scores in this one
    json: the runs, written after each; those that it holds are not run again
"""

import functools
import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.intervals import shown
from benchmarks.record import RESULTS, Record
from benchmarks.subjects.curve import Curve, Row
from benchmarks.subjects.upper_half import UpperHalf
from diffalign import Prompt, config
from diffalign.core import Guided, Policy, Progress, Streams, log_geometric_mean_distance
from diffalign.evaluation.diversity import entropy_number
from diffalign.prompts import read_prompts
from diffalign.samplers import DeterministicSampler
from diffalign.shapeworld import CountReward, ExactMatch
from diffalign.shapeworld.recognition import find_objects
from diffalign.shapeworld.render import SIZE

SEARCH = 100
"""The first seed of a search for settings."""
FIELDS = 4
"""Fields along each side of a picture."""
TASTE = "--rewards={class_path: benchmarks.subjects.upper_half.UpperHalf}"


def objective(name: str, **arguments: object) -> str:
    return f"--objective={{class_path: {name}, init_args: {{{', '.join(f'{key}: {value}' for key, value in arguments.items())}}}}}"


CHAINS = "--sampler={class_path: ChainSampler, init_args: {steps: 8, samples: %d, eta: 0.7, window: [1, 3]}}"
ENDS = "--sampler={class_path: DeterministicSampler, init_args: {steps: 8, samples: 9}}"
ARMS: Mapping[str, Sequence[str]] = {
    "softmax-tb": (),
    "softmax-tb, 60 nats": ("--objective.beta=60",),
    "softmax-tb, chains": (CHAINS % 9,),
    "group forward kl": (objective("GroupForwardKL", beta=20.0),),
    "flow-grpo": (objective("FlowGRPO", kl=0.0),),
    "flow-grpo, kl 0.1": (objective("FlowGRPO", kl=0.1),),
    "flow-grpo, kl 0.03": (objective("FlowGRPO", kl=0.03),),
    "flow-grpo, kl 1 / 20": (objective("FlowGRPO", kl=0.05, standardize="false"),),
    "flow-grpo, kl 1 / 20, chains": (objective("FlowGRPO", kl=0.05, standardize="false"), CHAINS % 9),
    "diffusion-nft": (objective("DiffusionNFT"), ENDS),
    "diffusion-nft, kl 0.1": (objective("DiffusionNFT", kl=0.1), ENDS),
    "dgpo": (objective("DGPO"), ENDS),
    "dgpo, kl 0.02": (objective("DGPO", kl=0.02), ENDS),
    "awm": (objective("AWM"), ENDS),
    "crd": (objective("CRD"), ENDS),
    "crd, kl 1": (objective("CRD", kl=1.0), ENDS),
    "ram": (objective("RAM", beta=1.0), ENDS),
    "ram, beta 5": (objective("RAM", beta=5.0), ENDS),
    "elbo policy gradient": (objective("ELBOPolicyGradient", kl=0.05), ENDS),
    "elbo softmax-tb": (objective("ELBOSoftmaxTB", beta=20.0), ENDS),
    "elbo softmax-tb, flow weighting": (objective("ELBOSoftmaxTB", beta=20.0, bound="{weighting: flow, sigma_min: 0.05}"), ENDS),
    "awm, kl 0.1": (objective("AWM", kl=0.1), ENDS),
}
"""Arm -> what it changes in the run file."""
BASES: Mapping[str, float] = {"base": 1.0, "base, guidance 1.5": 1.5, "base, guidance 3": 3.0}
"""Untrained policies by name, and their scale of guidance."""


@torch.no_grad()
def measured(policy: Policy, prompts: Sequence[Prompt], samples: int, seed: int, taste: bool) -> Row:
    """Reward and diversity on prompts, from further noise of a seed; diversity also of the exact pictures alone, or of the upper ones."""
    sampler = DeterministicSampler(8, samples)
    latents, images, asked = [], [], []
    for start in range(0, len(prompts), 4):
        some = prompts[start : start + 4]
        batch = sampler.sample(policy, policy.encode(some), Progress(0, 1), Streams(3_000_017 + seed, start))
        latents.append(batch.samples.cpu())
        images.append(policy.decode(batch.samples).float().cpu())
        asked += [start + index for index in batch.group.tolist()]
    samples_of_all, pictures, group = torch.cat(latents), torch.cat(images), torch.tensor(asked)
    words = [prompts[index] for index in asked]
    kinds = {"exact": ExactMatch()(pictures, words) == 1} | ({"upper": UpperHalf()(pictures, words) == 1} if taste else {})
    row = {
        "reward": float(CountReward()(pictures, words).mean()),
        **{kind: float(mine.double().mean()) for kind, mine in kinds.items()},
        "L-GMD": float(log_geometric_mean_distance(samples_of_all, group).mean()),
    }
    kind, right = list(kinds.items())[-1]
    several = [index for index in group.unique() if int((right & (group == index)).sum()) > 1]
    within = [
        log_geometric_mean_distance(mine, torch.zeros(len(mine), dtype=torch.long))
        for mine in (samples_of_all[right & (group == index)] for index in several)
    ]
    if within:
        row |= {f"L-GMD of the {kind}": float(torch.cat(within).mean()), f"fields of the {kind}": float(fields(pictures[right]))}
    return row


def fields(images: Tensor) -> Tensor:
    """Effective number of the fields that shapes stand in, exp(entropy) of their shares: at most `FIELDS` squared."""
    places = [(found.x, found.y) for objects in find_objects(images) for found in objects]
    cells = (torch.tensor(places) * FIELDS / SIZE).long().clamp(0, FIELDS - 1)
    counts = torch.bincount(cells[:, 0] * FIELDS + cells[:, 1], minlength=FIELDS**2).double()
    return entropy_number(counts / counts.sum())


def run(
    arm: str, seed: int, steps: int, groups: int, rate: float, at: Sequence[int], measure: functools.partial[Row], more: Sequence[str]
) -> dict[str, Any]:
    """Measures of one run, at its end and after the steps `at`.

    Args:
        arm: of `ARMS`
        seed: of the run and of the measured noise
        steps, groups, rate: of the run
        at: steps
        measure: measures a policy
        more: further options
    """
    fixed = [f"--seed={seed}", f"--prompts_per_step={groups}", "--evaluation=null", "--hooks=[]"]
    fixed.append(f"--optimizers={{default: {{class_path: AdamW, init_args: {{lr: {rate}, weight_decay: 0.0}}}}}}")
    loop = config.parse("shapeworld_tmpo", [*fixed, *ARMS[arm], *more]).build()
    curve = Curve((*at, steps), lambda loop, report: measure(loop.evaluation_policy(), seed=seed))
    begun = time.perf_counter()
    loop.advance(steps, also=[curve])
    print(arm, rate, seed, "  ".join(f"{name} {value:.3f}" for name, value in curve.rows[-1].items()), flush=True)
    return {"seconds": time.perf_counter() - begun, "rows": curve.rows}


def untrained(scale: float, measure: functools.partial[Row], seed: int, more: Sequence[str]) -> dict[str, Any]:
    """Measures of the base under guidance."""
    policy = config.parse("shapeworld_tmpo", ["--evaluation=null", "--hooks=[]", *more]).build().objective.policy.fork(pristine=True)
    return {"rows": [{"step": 0, **measure(Guided(policy, scale), seed=seed)}]}


def table(runs: Sequence[Mapping[str, Any]], search: bool) -> str:
    """One line an arm, rate and step, of the seeds that are reported or of those of the search."""
    kept: dict[tuple[Any, ...], list[Row]] = {}
    for entry in (entry for entry in runs if (entry["seed"] >= SEARCH) == search):
        for row in entry["rows"]:
            kept.setdefault((entry["arm"], entry["groups"], entry["steps"], entry["rate"], row["step"]), []).append(row)
    lines = []
    for (arm, groups, steps, rate, step), rows in sorted(kept.items()):
        known = [name for name in rows[0] if name != "step" and all(name in row for row in rows)]
        numbers = "  ".join(f"{name} {shown([row[name] for row in rows])}" for name in known)
        lines.append(f"{arm:30s} {groups:3d} groups {rate:.0e} {int(step):4d} of {steps:4d} n={len(rows)}  {numbers}")
    return "\n".join(lines)


def main(
    arms: tuple[Literal[*ARMS, *BASES], ...] = tuple(ARMS),
    seeds: int = 0,
    first: int = 0,
    steps: int = 90,
    groups: int = 10,
    rates: tuple[float, ...] = (1e-3,),
    prompts: int = 12,
    samples: int = 32,
    curve: tuple[int, ...] = (),
    taste: bool = False,
    device: str = "cpu",
    workers: int = 0,
    json: Path = RESULTS / "shapeworld_study.json",
) -> None:
    record = Record(json)
    kind = "runs, upper half" if taste else "runs"
    runs = record.content.setdefault(kind, [])
    more = [f"--policy.device={device}"]
    if taste:
        more.append(TASTE)
    elif workers:
        scored = f"{{reward: 'diffalign.shapeworld:CountReward', workers: {workers}}}"
        more.append(f"--rewards={{class_path: WorkerReward, init_args: {scored}}}")
    held_out = read_prompts("shapeworld/count-held-out")
    for seed, arm, rate in itertools.product(range(first, first + seeds), arms, rates):
        asked = held_out[:prompts] if seed >= SEARCH else held_out[prompts : 2 * prompts]
        measure = functools.partial(measured, prompts=asked, samples=samples, taste=taste)
        about = {"arm": arm, "seed": seed, "steps": steps, "groups": groups, "rate": rate, "prompts": prompts, "samples": samples}
        if arm in BASES:
            about |= {"steps": 0, "groups": 0, "rate": 0.0}
            record.run(kind, about, functools.partial(untrained, BASES[arm], measure, seed, more))
        else:
            record.run(kind, about, functools.partial(run, arm, seed, steps, groups, rate, curve, measure, more))
    print(f"search\n{table(runs, True)}\n\nreported\n{table(runs, False)}")
