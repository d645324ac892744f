"""Three teachers and one student on handwriting: what on-policy distillation keeps, and what training on all rewards reaches instead.

    base        the embedded flow, where every run starts
    teachers    three runs of Softmax-TB, each on one kind of prompts with the reward of its task alone:
                "even" on "a digit", "thick" on sets such as "an odd digit", "asked" on names such as "a thin seven"
    distilled   one student of the three by `OnPolicyDistillation`, whose prompts come from a `Mixture` of the three kinds
    mixture     one run of Softmax-TB on the same mixture with the three rewards, for as many network rows as the three teachers and the
                distillation took together; measured on its way at the rows of the distillation alone

Each task is measured on its own prompts, those that it trained on and those held out, over pictures from deterministic steps and noise that
all arms of a seed share. A policy keeps (its reward - base) / (teacher - base) of a task. It is also measured on the tasks that a teacher
did not learn.

Runs that the file holds are not run again. Without --seeds it prints the tables of the file: seeds from 100 on are the search, those
below are reported.

Args:
    seeds: runs of each arm
    first: the first seed; 100 begins a search
    steps: of a teacher
    distilled: steps of the distillation
    rate: of learning, of teachers and mixture
    student_rate: rate of learning of the distillation
    folder: of the teachers' weights
    json: the runs, written after each; those that it holds are not run again
"""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.intervals import shown
from benchmarks.record import RESULTS, Record
from benchmarks.subjects.curve import Curve, Row
from benchmarks.subjects.handwriting import TREE
from diffalign import AlignmentLoop, Prompt
from diffalign.core import Objective, Policy, Progress, PromptSource, Reward, Streams, TrajectorySampler
from diffalign.digits import ClassReward, DigitReward, DigitsPolicy, ThicknessReward
from diffalign.objectives import OnPolicyDistillation, SoftmaxTB
from diffalign.prompts import Mixture, Prompts, Source, read_prompts
from diffalign.samplers import DeterministicSampler

PATHS = DeterministicSampler(8, samples=4)
TASKS: Mapping[str, tuple[str, Reward]] = {
    "even": ("any", ClassReward((0, 2, 4, 6, 8))),
    "thick": ("set", ThicknessReward("thick")),
    "asked": ("name", DigitReward()),
}
"""Task -> kind of its prompts, and its reward."""
BETA = 20.0
PICTURES = 1536
"""Pictures at which a task is measured."""
SEARCH = 100
"""The first seed of a search for settings."""


def base() -> DigitsPolicy:
    return DigitsPolicy.from_pretrained("digits", device="cpu")


def prompts_of(task: str, held_out: bool = False) -> list[Prompt]:
    return list(read_prompts(f"digits/{TASKS[task][0]}{'-held-out' if held_out else ''}"))


def mixture() -> Mixture:
    return Mixture({task: Source(Prompts(prompts_of(task)), rewards=[task]) for task in TASKS})


def trained(
    objective: Objective, sampler: TrajectorySampler, prompts: PromptSource, tasks: Sequence[str], run: tuple[int, int, float], curve: Curve
) -> None:
    """Trains the policy of an objective.

    Args:
        objective, sampler, prompts: of the loop
        tasks: whose rewards score the prompts
        run: seed, steps and rate of learning
        curve: measures it on its way
    """
    seed, steps, rate = run
    loop = AlignmentLoop(
        objective=objective,
        sampler=sampler,
        rewards={task: TASKS[task][1] for task in tasks},
        prompts=prompts,
        prompts_per_step=12 if sampler is PATHS else 8,
        optimizers={"default": lambda parameters: torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)},
        seed=seed,
        check_rows=0,
    )
    loop.advance(steps, also=[curve])


@torch.no_grad()
def measured(policy: Policy, seed: int) -> Row:
    """Mean reward of each task on its prompts, and on those held out."""
    row: Row = {}
    for task, (_, reward) in TASKS.items():
        for held_out in (False, True):
            prompts = prompts_of(task, held_out)
            sampler = DeterministicSampler(8, samples=PICTURES // len(prompts), rows=1024)
            batch = sampler.sample(policy, policy.encode(prompts), Progress(0, 1), Streams(1_000_003 + seed))
            told = [prompts[index] for index in batch.group.tolist()]
            row[f"{task}, held out" if held_out else task] = float(reward(policy.decode(batch.samples), told).mean())
    return row


def told(arm: str, seed: int, spent: Mapping[str, Any], row: Row) -> dict[str, Any]:
    print(arm, seed, f"{spent['rows']:.0f} rows", json.dumps({name: round(value, 3) for name, value in row.items()}), flush=True)
    return {"rows": spent["rows"], "seconds": spent["seconds"], "row": row}


def untrained(seed: int) -> dict[str, Any]:
    return told("base", seed, {"rows": 0.0, "seconds": 0.0}, measured(base(), seed))


def teacher(task: str, run: tuple[int, int, float], place: Path) -> dict[str, Any]:
    """Trains a teacher, and writes its weights.

    Args:
        task: what it learns
        run: seed, steps and rate of learning
        place: folder of its weights
    """
    policy = base()
    curve = Curve([run[1]], lambda loop, report: {})
    trained(SoftmaxTB(policy, beta=BETA), TREE, Prompts(prompts_of(task)), [task], run, curve)
    policy.save(str(place))
    return told(f"teacher, {task}", run[0], curve.rows[-1], measured(policy, run[0]))


def student(run: tuple[int, int, float], places: Mapping[str, Path]) -> dict[str, Any]:
    """Distils the teachers into one student.

    Args:
        run: seed, steps and rate of learning
        places: task -> folder of its teacher's weights
    """
    policy = base()
    teachers = {task: DigitsPolicy.from_pretrained(str(place), device="cpu", trainable=False) for task, place in places.items()}
    curve = Curve([run[1]], lambda loop, report: {})
    trained(OnPolicyDistillation(policy, teachers), PATHS, mixture(), list(TASKS), run, curve)
    return told("distilled", run[0], curve.rows[-1], measured(policy, run[0]))


def direct(seed: int, rate: float, rows: Sequence[float], each: float) -> dict[str, Any]:
    """Trains on the mixture of rewards.

    Args:
        seed, rate: of the run
        rows: network rows at which it is measured, in rising order; it ends at the last
        each: network rows of a step
    """
    policy = base()
    steps = [max(1, round(count / each)) for count in rows]
    curve = Curve(steps, lambda loop, report: {"row": measured(policy, seed)})
    trained(SoftmaxTB(policy, beta=BETA), TREE, mixture(), list(TASKS), (seed, steps[-1], rate), curve)
    return told("mixture", seed, curve.rows[-1], curve.rows[-1]["row"]) | {"curve": curve.rows}


def table(runs: Sequence[Mapping[str, Any]], search: bool) -> str:
    """One line an arm and setting, of the seeds that are reported or of those of the search: rewards, and what is kept of each gain."""
    entries = [entry for entry in runs if (entry["seed"] >= SEARCH) == search]
    found = {(entry["arm"], entry["steps"], entry["rate"], entry["seed"]): entry["row"] for entry in entries}
    lines: dict[tuple[Any, ...], list[tuple[Row, Row]]] = {}
    for entry in entries:
        seed, about = entry["seed"], (entry["steps"], entry["rate"])
        low = found["base", 0, 0.0, seed]
        gain: Row = {}
        if entry["arm"] != "base":
            gain = {name: found[f"teacher, {name.split(',')[0]}", *about, seed][name] - low[name] for name in low}
        for point in entry.get("curve", (entry,)):
            kept = {name: (point["row"][name] - low[name]) / (gain[name] or math.nan) for name in gain}
            arm = f"{entry['arm']}, {point['rows'] / 1000:.0f} thousand rows"
            lines.setdefault((arm, *about, entry["distilled"], entry["student_rate"]), []).append((point["row"], kept))
    return "\n".join(
        f"{arm:36s} {' '.join(f'{number:g}' for number in about):22s} n={len(rows)}  "
        + "  ".join(
            f"{name} {shown([row[name] for row, _ in rows])}"
            + (f" keeps {shown([kept[name] for _, kept in rows], 2)}" if name in rows[0][1] else "")
            for name in rows[0][0]
        )
        for (arm, *about), rows in lines.items()
    )


def main(
    seeds: int = 0,
    first: int = 0,
    steps: int = 150,
    distilled: int = 300,
    rate: float = 2e-4,
    student_rate: float = 5e-4,
    folder: Path = Path("runs/distilled_study"),
    json: Path = RESULTS / "distilled_study.json",
) -> None:
    record = Record(json)
    runs = record.content.setdefault("runs", [])
    for seed in range(first, first + seeds):
        places = {task: folder / f"{task}-{seed}-{steps}-{rate:g}" for task in TASKS}
        of_teachers = {"seed": seed, "steps": steps, "rate": rate, "distilled": 0, "student_rate": 0.0}
        of_students = {**of_teachers, "distilled": distilled, "student_rate": student_rate}
        nothing = {"arm": "base", **of_teachers, "steps": 0, "rate": 0.0}
        record.run("runs", nothing, functools.partial(untrained, seed))
        spent = 0.0
        for task, place in places.items():
            about = {"arm": f"teacher, {task}", **of_teachers}
            spent += record.run("runs", about, functools.partial(teacher, task, (seed, steps, rate), place))["rows"]
        make = functools.partial(student, (seed, distilled, student_rate), places)
        own = record.run("runs", {"arm": "distilled", **of_students}, make)["rows"]
        make = functools.partial(direct, seed, rate, (own, spent + own), spent / (3 * steps))
        record.run("runs", {"arm": "mixture", **of_students, "student_rate": 0.0}, make)
    print(f"search\n{table(runs, True)}\n\nreported\n{table(runs, False)}")
