"""Three specialists become one: on-policy distillation of handwriting, each teacher on its own prompts.

python examples/digits_distilled.py [--steps 100] [--distilled 200] [--pictures 480] [--seed 0] [--json FILE]

Three runs of Softmax Trajectory Balance start from the embedded flow. Each has one kind of prompts and one reward: even digits for
"a digit", thick strokes for sets such as "an odd digit", the digit that is asked for by name. Then one student learns from the three, on
its own states: a `Mixture` names the source of every prompt, and the source names the teacher. The table has the reward of each task for
each of the five policies, from the same noise. About three minutes on one free core.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import torch

from diffalign import AlignmentLoop
from diffalign.core import Objective, Policy, Progress, PromptSource, Reward, Streams, TrajectorySampler
from diffalign.digits import ClassReward, DigitReward, DigitsPolicy, ThicknessReward
from diffalign.objectives import OnPolicyDistillation, SoftmaxTB
from diffalign.prompts import Mixture, PromptFile, Source
from diffalign.samplers import DeterministicSampler, FixedPlan, TreeSampler

TASKS: Mapping[str, tuple[PromptFile, Reward]] = {
    "even": (PromptFile("digits/any"), ClassReward((0, 2, 4, 6, 8))),
    "thick": (PromptFile("digits/set"), ThicknessReward("thick")),
    "asked": (PromptFile("digits/name"), DigitReward()),
}


def run(
    objective: Objective,
    sampler: TrajectorySampler,
    rewards: Mapping[str, Reward],
    prompts: PromptSource,
    steps: int,
    seed: int,
    rate: float,
) -> Policy:
    """The policy of the objective after some steps of 9 prompts."""
    loop = AlignmentLoop(
        objective=objective,
        sampler=sampler,
        rewards=rewards,
        prompts=prompts,
        prompts_per_step=9,
        optimizers={"default": lambda parameters: torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)},
        seed=seed,
    )
    loop.run(steps)
    return objective.policy


def teacher(task: str, steps: int, seed: int) -> Policy:
    """The embedded flow, aligned for one task, and frozen."""
    prompts, reward = TASKS[task]
    tree = TreeSampler(8, FixedPlan((1, 2, 3), branches=3, eta=0.7))
    policy = run(
        SoftmaxTB(DigitsPolicy.from_pretrained("digits", device="cpu"), beta=20.0), tree, {task: reward}, prompts, steps, seed, 2e-4
    )
    return policy.requires_grad_(False)


def student(teachers: Mapping[str, Policy], steps: int, seed: int) -> Policy:
    """The embedded flow after its lessons. Rewards do not teach here; they show in the metrics how far it has come in each task."""
    prompts = Mixture({task: Source(listed, rewards=[task]) for task, (listed, _) in TASKS.items()})
    rewards = {task: reward for task, (_, reward) in TASKS.items()}
    lessons = OnPolicyDistillation(DigitsPolicy.from_pretrained("digits", device="cpu"), teachers)
    return run(lessons, DeterministicSampler(8, samples=4), rewards, prompts, steps, seed, 5e-4)


@torch.no_grad()
def measure(policy: Policy, pictures: int) -> dict[str, float]:
    """Mean reward of each task over pictures of its own prompts."""
    found = {}
    for task, (listed, reward) in TASKS.items():
        prompts = listed.prompts
        batch = DeterministicSampler(8, samples=-(-pictures // len(prompts))).sample(
            policy, policy.encode(prompts), Progress(0, 1), Streams(2026)
        )
        told = [prompts[place] for place in batch.group.tolist()]
        found[task] = float(reward(policy.decode(batch.samples), told).mean())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="alignment steps of each teacher")
    parser.add_argument("--distilled", type=int, default=200, help="steps of the student")
    parser.add_argument("--pictures", type=int, default=480, help="pictures at which a task is measured")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the table here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the network is small
    teachers = {task: teacher(task, arguments.steps, arguments.seed) for task in TASKS}
    policies = {
        "base": DigitsPolicy.from_pretrained("digits", device="cpu"),
        **{f"teacher of {task!r}": policy for task, policy in teachers.items()},
        "student": student(teachers, arguments.distilled, arguments.seed),
    }
    table = {name: measure(policy, arguments.pictures) for name, policy in policies.items()}
    print(f"{'reward':20s}" + "".join(f"{task:>10s}" for task in TASKS))
    for name, row in table.items():
        print(f"{name:20s}" + "".join(f"{value:10.3f}" for value in row.values()))
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
