"""Four steps and a reward without a gradient, on handwriting: what TDM-R1 adds to distillation, at which budget.

    base, 100 / 8 / 4 evaluations    the embedded flow
    TDM                              its student of 4 steps (run file `digits_tdm`), where every arm starts; made once, kept in --student
    TDM-R1                           the run file `digits_tdm_r1`
    no reward term                   the control: the same run, whose generator is not shown the reward
    TDM and direct RL                no surrogate: DGPO's loss on the student beside its distillation (the paper's ablation)
    DGPO alone                       the same loss without distillation
    shared noise, stages of a step   TDM-R1 with fewer independent draws: one noise and tau a group, stages once a step

The prompts are "a digit" and "a thick digit"; the rewards see pixels alone: `even` says yes to even digits, `thick` grades the stroke, and
`likes` is a person's yes or no to even digits with a tenth of the answers wrong. Every arm draws groups x samples pictures a step. Measured
on the prompt "a digit", 2,048 pictures from noise that is the same for all arms of a seed: trained reward, `even` and `thick`, the share
in which a digit is seen at all, effective digits (all, and even ones), the spread within a digit, and the distance to real pictures; the
trained reward on the held-out prompt "a thin digit"; and how far other prompts are still followed (`DigitReward`, the nine held-out prompts
of all kinds). `--curve` measures a run on its way, too, and how many pairs of a group its surrogate orders rightly.

Runs that the file holds are not run again. Without --seeds it prints the tables of the file: seeds from 100 on are the search, those
below are reported.

Args:
    arms: what is trained
    seeds: runs of each arm
    first: the first seed; 100 begins a search
    steps: of a run
    groups: prompt groups of a step
    samples: of a group
    task: what is rewarded
    set: what to change in the run file beside the arm, as OPTION=VALUE
    curve: steps at which a run is measured before its end
    student: folder of the distillation
    json: the runs, written after each; those that it holds are not run again
"""

import functools
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.intervals import shown
from benchmarks.record import RESULTS, Record
from benchmarks.subjects.curve import Curve, Row
from benchmarks.subjects.surrogate_order import implicit_rewards, pairs_ordered
from diffalign import AlignmentLoop, Prompt, config
from diffalign.core import Policy, Progress, Reward, Streams
from diffalign.digits import (
    ClassReward,
    DigitReward,
    DigitsPolicy,
    LikesReward,
    ThicknessReward,
    class_shares,
    distance_to_real,
    effective_classes,
    probabilities,
)
from diffalign.evaluation.diversity import cosine_distance
from diffalign.objectives import SurrogateReward
from diffalign.policies import TDMPolicy
from diffalign.prompts import read_prompts
from diffalign.samplers import DeterministicSampler

EVEN = (0, 2, 4, 6, 8)
PROMPT, HELD_OUT = Prompt("a digit"), Prompt("a thin digit")
SEARCH = 100
"""The first seed of a search for settings."""

TASKS: Mapping[str, tuple[str, Reward]] = {
    "even": ("{class_path: ClassReward, init_args: {classes: [0, 2, 4, 6, 8]}}", ClassReward(EVEN)),
    "thick": ("{class_path: ThicknessReward, init_args: {target: thick}}", ThicknessReward("thick")),
    "likes": ("{class_path: LikesReward, init_args: {classes: [0, 2, 4, 6, 8], error: 0.1}}", LikesReward(EVEN, 0.1)),
}
EXACT = {"even": "even", "thick": "thick", "likes": "even"}
"""Task -> the measure that says how well it is done."""
TEACHER = "teacher: {class_path: DigitsPolicy.from_pretrained, init_args: {path: digits, trainable: false}}"
ADAM = "{class_path: AdamW, init_args: {lr: %s, betas: [0.0, 0.999], weight_decay: 0.0}}"
ARMS: Mapping[str, Sequence[str]] = {
    "TDM-R1": (),
    "no reward term": ("--objective.mix.reward=0",),
    "TDM and direct RL": (
        "--objective={class_path: DirectReinforcement, init_args: {"
        + TEACHER
        + ", interval: {class_path: Separate}, stages: {class_path: UniformStages, init_args: {count: 2}}, "
        "plan: {class_path: Together, init_args: {warmup: 20}}, levels: 2, beta: 10.0}}",
        "--optimizers={fake: " + ADAM % "1e-3" + ", generator: " + ADAM % "1e-4" + "}",
    ),
    "DGPO alone": (
        "--objective={class_path: DGPO, init_args: {levels: 2, beta: 10.0}}",
        "--optimizers={policy: " + ADAM % "1e-4" + "}",
    ),
    "shared noise, stages of a step": ("--objective.reward_noise=group", "--objective.shared=group", "--objective.stages_by=step"),
}
"""Arm -> what it changes in the run file."""

BASES = {"base, 100 evaluations": 100, "base, 8 evaluations": 8, "base, 4 evaluations": 4}
STUDENT = "TDM, 4 evaluations"


def distilled(folder: Path, steps: int | None = None) -> Path:
    """The folder of the student that all arms start from; made by `digits_tdm` where it is missing.

    Args:
        folder: of the run
        steps: of the distillation; None takes the run file's
    """
    student = folder / "student"
    if not (student / "student.json").exists():
        job = config.parse("digits_tdm", [f"--folder={folder}", "--evaluation=null", "--policy.policy.device=cpu"])
        loop = job.build()
        loop.folder = folder
        loop.run(job.tree["total"] if steps is None else steps)
    return student


def loaded(student: Path) -> TDMPolicy:
    return TDMPolicy.from_saved(DigitsPolicy.from_pretrained("digits", device="cpu"), str(student))


def trained(
    arm: str, task: str, seed: int, student: Path, steps: int, size: tuple[int, int], changes: Sequence[str], curve: Curve
) -> Policy:
    """The student after one run.

    Args:
        arm, task: of `ARMS` and `TASKS`
        seed: of the run
        student: where every arm starts
        steps: of the run
        size: groups of a step, samples of a group
        changes: options beside those of the arm
        curve: measures it on its way
    """
    fixed = [
        f"--policy.path={student}",
        "--policy.policy.device=cpu",
        f"--rewards={TASKS[task][0]}",
        f"--seed={seed}",
        f"--prompts_per_step={size[0]}",
        f"--sampler.samples={size[1]}",
        "--evaluation=null",
        "--hooks=[]",
        "--check_rows=0",
    ]
    loop = config.parse("digits_tdm_r1", [*fixed, *ARMS[arm], *changes]).build()
    loop.advance(steps, also=[curve])
    return loop.evaluation_policy()


def ordered(loop: AlignmentLoop, task: str, seed: int) -> Row:
    """Share of pairs that the surrogate of a run orders rightly, among the student's present samples; nothing if it has no surrogate."""
    objective = loop.objective
    if not isinstance(objective, SurrogateReward):
        return {}
    policy = objective.policy
    with torch.no_grad():
        batch = loop.sampler.sample(policy, policy.encode([PROMPT] * 24), Progress(0, 1), Streams(2_000_003 + seed))
        rewards = TASKS[EXACT[task]][1](policy.decode(batch.samples), [PROMPT] * len(batch.samples))
    return {"ordered": pairs_ordered(implicit_rewards(objective, batch, 8, 2_000_003 + seed), rewards, batch.group)}


@torch.no_grad()
def pictures(policy: Policy, steps: int, prompts: Sequence[Prompt], samples: int, seed: int) -> tuple[Tensor, list[Prompt]]:
    """Pictures [K, 3, H, W] and their prompts, from further noise of a seed."""
    batch = DeterministicSampler(steps, samples=samples, rows=1024).sample(
        policy, policy.encode(prompts), Progress(0, 1), Streams(1_000_003 + seed)
    )
    return policy.decode(batch.samples), [prompts[index] for index in batch.group.tolist()]


def spread(images: Tensor) -> float:
    """Mean cosine distance of pictures of the same digit, of the digits that are seen more than once: diversity within a digit."""
    seen = probabilities(images)
    label, pixels = seen.argmax(dim=1), images.mean(dim=1)[:, ::8, ::8].flatten(1)
    kept = [pixels[label == digit] for digit in range(10) if int((label == digit).sum()) > 1]
    return float(torch.stack([cosine_distance(some) for some in kept]).mean())


def measured(policy: Policy, steps: int, task: str, seed: int) -> Row:
    images, prompts = pictures(policy, steps, [PROMPT], 2048, seed)
    shares = class_shares(images)
    other, asked = pictures(policy, steps, [HELD_OUT], 1024, seed)
    wide, wishes = pictures(policy, steps, read_prompts("digits/all-held-out"), 96, seed)
    return {
        "reward": float(TASKS[task][1](images, prompts).mean()),
        "even": float(TASKS["even"][1](images, prompts).mean()),
        "thick": float(TASKS["thick"][1](images, prompts).mean()),
        "seen": float(shares.sum()),
        "digits": effective_classes(shares),
        "even digits": effective_classes(shares, EVEN),
        "spread": spread(images),
        "distance": distance_to_real(images),
        "held-out prompt": float(TASKS[task][1](other, asked).mean()),
        "followed": float(DigitReward()(wide, wishes).mean()),
    }


def key_of(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells runs apart, seeds aside."""
    return (entry["task"], entry["groups"], entry["samples"], entry["steps"], entry["arm"], tuple(entry["set"]))


def table(runs: Sequence[Mapping[str, Any]], search: bool) -> str:
    """One line a task, budget and arm, of the seeds that are reported or of those of the search, and differences paired by seed.

    Differences are those of the exact measure of the task. The base, and the control, whose generator sees no reward, are the same policies
    whatever the task, so they are taken from where they were measured.
    """
    entries = [entry for entry in runs if (entry["seed"] >= SEARCH) == search]
    groups: dict[tuple[Any, ...], dict[int, Row]] = {}
    for entry in entries:
        groups.setdefault(key_of(entry), {})[entry["seed"]] = entry["row"]
    lines = []
    for (task, count, samples, steps, arm, changes), rows in sorted(groups.items()):
        budget = f"{count} x {samples} x {steps}" if steps else ""
        numbers = "  ".join(f"{name} {shown([row[name] for row in rows.values()])}" for name in next(iter(rows.values())))
        lines.append(f"{task:5s} {arm:30s} {budget:14s} n={len(rows)}  {numbers}  {' '.join(changes)}")
        for other in ("base, 100 evaluations", STUDENT, "no reward term"):
            against = {
                entry["seed"]: entry["row"]
                for entry in entries
                if entry["arm"] == other and (entry["groups"], entry["samples"], entry["steps"]) in ((0, 0, 0), (count, samples, steps))
            }
            both = sorted(rows.keys() & against.keys())
            if steps and both and arm != other:
                change = [rows[seed][EXACT[task]] - against[seed][EXACT[task]] for seed in both]
                lines.append(f"{'':36s} {EXACT[task]} above {other}: {shown(change)}")
    return "\n".join(lines)


def curves(runs: Sequence[Mapping[str, Any]]) -> str:
    """One line a run and step at which it was measured on its way, with the samples drawn until then."""
    return "\n".join(
        f"{entry['task']:5s} {entry['arm']:30s} seed {entry['seed']:3d} {row['step'] * entry['groups'] * entry['samples']:7d} samples  "
        + "  ".join(f"{name} {value:.3f}" for name, value in row.items() if name != "step")
        + "  "
        + " ".join(entry["set"])
        for entry in sorted(runs, key=key_of)
        for row in entry.get("curve", ())
    )


def told(arm: str, seed: int, seconds: float, row: Row) -> dict[str, Any]:
    print(arm, seed, f"{seconds:.0f} s", json.dumps({name: round(value, 3) for name, value in row.items()}), flush=True)
    return {"seconds": seconds, "row": row}


def untrained(name: str, task: str, seed: int, folder: Path) -> dict[str, Any]:
    """What is measured of a base or of the student.

    Args:
        name: of `BASES`, or the student's
        task: of `TASKS`
        seed: of the noise
        folder: of the distillation
    """
    policy = loaded(distilled(folder)) if name == STUDENT else DigitsPolicy.from_pretrained("digits", device="cpu")
    return told(name, seed, 0.0, measured(policy, BASES.get(name, 4), task, seed))


def run(
    arm: str, task: str, seed: int, folder: Path, steps: int, size: tuple[int, int], changes: Sequence[str], at: Sequence[int]
) -> dict[str, Any]:
    """What is measured of the student after one run, and on its way after the steps `at`; the rest as for `trained`.

    Args:
        folder: of the distillation
    """
    student = distilled(folder)
    curve = Curve(at, lambda loop, report: measured(loop.evaluation_policy(), 4, task, seed) | ordered(loop, task, seed))
    begun = time.process_time()
    policy = trained(arm, task, seed, student, steps, size, changes, curve)
    seconds = time.process_time() - begun
    return told(arm, seed, seconds, measured(policy, 4, task, seed)) | ({"curve": curve.rows} if at else {})


def main(
    arms: tuple[Literal[*ARMS], ...] = ("TDM-R1", "no reward term", "TDM and direct RL", "DGPO alone"),
    seeds: int = 0,
    first: int = 0,
    steps: int = 200,
    groups: int = 4,
    samples: int = 24,
    task: Literal[*TASKS] = "even",
    set: tuple[str, ...] = (),  # noqa: A002  # names the option
    curve: tuple[int, ...] = (),
    student: Path = Path("runs/few_study"),
    json: Path = RESULTS / "few_study.json",
) -> None:
    record = Record(json)
    runs = record.content.setdefault("runs", [])
    changes = sorted(set)
    for seed in range(first, first + seeds):
        for name in (*BASES, STUDENT):
            about = {"task": task, "groups": 0, "samples": 0, "steps": 0, "arm": name, "set": [], "seed": seed}
            record.run("runs", about, functools.partial(untrained, name, task, seed, student))
        for arm in arms:
            about = {"task": task, "groups": groups, "samples": samples, "steps": steps, "arm": arm, "set": changes, "seed": seed}
            options = [f"--{change}" for change in changes]
            record.run("runs", about, functools.partial(run, arm, task, seed, student, steps, (groups, samples), options, curve))
    print(f"search\n{table(runs, True)}\n\nreported\n{table(runs, False)}\n\non the way\n{curves(runs)}")
