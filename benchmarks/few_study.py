"""Four steps and a reward without a gradient, on handwriting: what TDM-R1 adds to distillation, at which budget.

python benchmarks/few_study.py [--arms NAME ...] [--seeds 3] [--steps 200] [--groups 4] [--samples 24] [--task even|thick|likes]
                               [--set OPTION=VALUE ...] [--json FILE] [--student FOLDER]

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
of all kinds).

Runs that the JSON file holds are not run again. Without --seeds it prints the tables of the file: seeds from 100 on are the search, those
below are reported.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ring_study import interval
from torch import Tensor

from diffalign import Policy, Progress, Prompt, Streams, config
from diffalign.core import Reward
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
from diffalign.policies import TDMPolicy
from diffalign.prompts import read_prompts
from diffalign.samplers import DeterministicSampler

Row = dict[str, float]
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


def trained(arm: str, task: str, seed: int, student: Path, steps: int, size: tuple[int, int], changes: Sequence[str]) -> Policy:
    """The student after one run.

    Args:
        arm, task: of `ARMS` and `TASKS`
        seed: of the run
        student: where every arm starts
        steps: of the run
        size: groups of a step, samples of a group
        changes: options beside those of the arm
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
    loop.run(steps)
    return loop.evaluation_policy()


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


def shown(values: list[float]) -> str:
    """Mean and half of its 95 % interval (t)."""
    mean, half = interval(values)
    return f"{mean:.3f}" if len(values) < 2 else f"{mean:.3f} +- {half:.3f}"


def key_of(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells runs apart, seeds aside."""
    return (entry["task"], entry["groups"], entry["samples"], entry["steps"], entry["arm"], tuple(entry["set"]))


def table(known: Mapping[str, Any], search: bool) -> str:
    """One line a task, budget and arm, of the seeds that are reported or of those of the search, and differences paired by seed.

    Differences are those of the exact measure of the task. The base, and the control, whose generator sees no reward, are the same policies
    whatever the task, so they are taken from where they were measured.
    """
    entries = [entry for entry in known["runs"] if (entry["seed"] >= SEARCH) == search]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=["TDM-R1", "no reward term", "TDM and direct RL", "DGPO alone"])
    parser.add_argument("--seeds", type=int, default=0, help="runs of each arm")
    parser.add_argument("--first", type=int, default=0, help=f"the first seed; {SEARCH} begins a search")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--groups", type=int, default=4, help="prompt groups of a step")
    parser.add_argument("--samples", type=int, default=24, help="of a group")
    parser.add_argument("--task", choices=list(TASKS), default="even")
    parser.add_argument("--set", nargs="*", default=[], metavar="OPTION=VALUE", help="what to change in the run file beside the arm")
    parser.add_argument("--student", type=Path, default=Path("runs/few_study"), help="folder of the distillation")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "few_study.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    known: dict[str, Any] = json.loads(arguments.json.read_text()) if arguments.json.exists() else {"runs": []}
    done = {(*key_of(entry), entry["seed"]) for entry in known["runs"]}
    changes, task = sorted(arguments.set), arguments.task

    def note(arm: str, seed: int, size: tuple[int, int, int], options: list[str], seconds: float, row: Row) -> None:
        about = {"task": task, "groups": size[0], "samples": size[1], "steps": size[2], "arm": arm, "set": options, "seed": seed}
        known["runs"].append({**about, "seconds": seconds, "row": row})
        arguments.json.write_text(json.dumps(known, indent=1) + "\n")
        print(arm, seed, f"{seconds:.0f} s", json.dumps({name: round(value, 3) for name, value in row.items()}), flush=True)

    for seed in range(arguments.first, arguments.first + arguments.seeds):
        student = distilled(arguments.student)
        for name in (*BASES, STUDENT):
            if (task, 0, 0, 0, name, (), seed) not in done:
                policy = loaded(student) if name == STUDENT else DigitsPolicy.from_pretrained("digits", device="cpu")
                note(name, seed, (0, 0, 0), [], 0.0, measured(policy, BASES.get(name, 4), task, seed))
        for arm in arguments.arms:
            if (task, arguments.groups, arguments.samples, arguments.steps, arm, tuple(changes), seed) in done:
                continue
            begun = time.process_time()
            options = [f"--{change}" for change in changes]
            policy = trained(arm, task, seed, student, arguments.steps, (arguments.groups, arguments.samples), options)
            seconds = time.process_time() - begun
            size = (arguments.groups, arguments.samples, arguments.steps)
            note(arm, seed, size, changes, seconds, measured(policy, 4, task, seed))
    print(f"search\n{table(known, True)}\n\nreported\n{table(known, False)}")


if __name__ == "__main__":
    main()
