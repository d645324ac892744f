"""One student for 1, 2 and 4 steps, beside a student for each: distillation on the ring of eight modes.

The network of the ring reads no text, so here a policy around it reads the number of steps from the tag of the prompt, and adds to the
velocity what a small network makes of it. The student of several numbers draws one at each step (`DrawnSteps`), so it gets as many
steps of each number as a student of that number alone if it is trained for three times as many in all; both are given.
Distance to the nearest mode is the root of the mean square, 0.42 for exact modes.

Args:
    pretrain: steps of the base's training
    distil: steps of distillation of a student of one number of steps
    seed: of all training
    json: also write the table here
"""

import copy
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from benchmarks.record import write
from benchmarks.subjects.examples import ring, ring_tdm_r1
from diffalign.core import Condition, Policy, PolicyAround, Prompt, ShiftedGrid
from diffalign.objectives import TrajectoryDistributionMatching
from diffalign.policies import TDMPolicy
from diffalign.samplers import DeterministicSampler, DrawnSteps

STEPS = (1, 2, 4)
TAG = " in {steps} steps"
Row = dict[str, float]


class ReadsSteps(PolicyAround):
    """Adds to the velocity of the policy inside what a network makes of point, sigma and the number of steps that the prompt names.

    Args:
        policy: the one inside
        head: the network; None makes one that adds nothing yet
    """

    def __init__(self, policy: Policy, head: nn.Module | None = None) -> None:
        super().__init__(policy)
        if head is None:
            head = nn.Sequential(nn.Linear(2 + 2 + len(STEPS), 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2))
            nn.init.zeros_(head[-1].weight)
            nn.init.zeros_(head[-1].bias)
        self.head = head

    def encode(self, prompts: Sequence[Prompt]) -> Condition:
        named = [re.search(r" in (\d) steps$", prompt) for prompt in prompts]
        one_hot = [[float(found is not None and int(found[1]) == steps) for steps in STEPS] for found in named]
        return Condition(tuple(prompts), torch.arange(len(prompts)), {"steps": torch.tensor(one_hot)})

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        angles = sigma[:, None] * torch.pi / 2
        inputs = torch.cat([latents, angles.sin(), angles.cos(), condition.tensors["steps"]], dim=1)
        added: Tensor = self.head(inputs)
        return self.policy.velocity(latents, sigma, condition) + added

    def own_parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.named_parameters())

    def fork(self, *, trainable: bool = False, pristine: bool = False) -> Self:
        head = copy.deepcopy(self.head).requires_grad_(trainable)
        return type(self)(self.policy.fork(trainable=trainable, pristine=pristine), head)


def student_of(base: Policy, counts: Sequence[int], total: int, seed: int) -> Policy:
    """A student of some numbers of steps, the last the main one, distilled in `total` steps as in `examples/ring_tdm_r1.py`."""
    *also, main = counts
    torch.manual_seed(seed)  # of the heads
    teacher = ReadsSteps(base).fork()
    student = TDMPolicy(teacher.fork(trainable=True), main, ShiftedGrid(3.0), TAG, also=also)
    objective = TrajectoryDistributionMatching(student, teacher=teacher)
    sampler = DrawnSteps(counts, samples=64) if also else DeterministicSampler(main, samples=64)
    optimizers = {"fake": ring_tdm_r1.adam(2e-3), "generator": ring_tdm_r1.adam(5e-4)}
    return ring_tdm_r1.trained(objective, optimizers, total, seed, sampler)


def main(pretrain: int = 2500, distil: int = 400, seed: int = 0, json: Path | None = None) -> None:
    start = time.process_time()
    base = ring.trained_base(seed, pretrain).fork()
    table: dict[str, Row] = {}

    def measure(name: str, policy: Policy, steps: int) -> None:
        table[f"{name}, {steps} steps"] = row = ring_tdm_r1.measured(ring_tdm_r1.points_of(policy, steps))
        numbers = " ".join(f"{key} {row[key]:.3f}" for key in ("mass", "modes", "distance"))
        print(f"{name + f', {steps} steps':30s} {numbers}   {time.process_time() - start:.0f} s", flush=True)

    for steps in STEPS:
        measure("base", TDMPolicy(base, steps, ShiftedGrid(3.0)), steps)
    for name, factor in (("one for all", 1), ("one for all, three times", 3)):
        student = student_of(base, STEPS, factor * distil, seed)
        for steps in STEPS:
            measure(name, student.at(steps), steps)
    for steps in STEPS:
        measure("alone", student_of(base, [steps], distil, seed), steps)
    write(json, table)
