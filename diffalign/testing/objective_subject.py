"""Objective under examination, and what its checks share: trajectories that it accepts, its losses, gradients and loop."""

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from diffalign.core import (
    AlignmentLoop,
    Condition,
    Loss,
    Objective,
    Policy,
    Progress,
    Prompt,
    ScoredBatch,
    Streams,
    TrajectoryBatch,
    TrajectorySampler,
)
from diffalign.core.update import phases_of, yielded
from diffalign.prompts import Prompts
from diffalign.samplers import DeterministicSampler, FixedPlan, TreeSampler

from .building import require_from_policy
from .doubles import TinyPolicy
from .elsewhere import prepare_second_device

Make = Callable[[Policy], Objective]
"""Function that builds the objective around the policy that it trains."""

PROMPTS = (Prompt("a red cube"), Prompt("two blue stars"), Prompt("three green disks"))
STEPS = 5
SAMPLERS: tuple[TrajectorySampler, ...] = (
    TreeSampler(STEPS, FixedPlan((1, 2), branches=3)),
    DeterministicSampler(STEPS, samples=6),
    DeterministicSampler(4, samples=6),
)


@attrs.frozen(eq=False)
class Subject:
    """Objective that is checked, with a sampler of trajectories that it accepts.

    Args:
        make: function that builds it
        sampler: the first sampler of `check_objective` whose batches it accepts
        device: device of its policies
    """

    make: Make
    sampler: TrajectorySampler
    device: str = "cpu"

    def policy(self) -> TinyPolicy:
        """Build the policy that the objective trains."""
        return TinyPolicy((2, 2), dtype=torch.float64).to(self.device)

    def built(self) -> Objective:
        """Build the objective around a policy of its own.

        Raises:
            ValueError: what was built is no objective.
        """
        objective: Any = self.make(self.policy())
        if not isinstance(objective, Objective):
            raise ValueError(f"{_named(self.make)} must give an Objective; it gave {type(objective).__name__}")
        return objective

    def loop(self) -> AlignmentLoop:
        """Build a loop around the objective, whose reward is larger for a larger first number of a sample."""
        return AlignmentLoop(
            objective=self.built(),
            sampler=self.sampler,
            rewards=first_coordinate,
            prompts=Prompts(PROMPTS),
            prompts_per_step=2,
            optimizers={"default": lambda parameters: torch.optim.SGD(parameters, lr=0.1)},
            check_rows=0,
        )

    def moved(self, **changes: int) -> Objective:
        """Build the objective, with some fields changed, in a state as after some updates: all weights that it trains have moved.

        Every role moves in another direction. If one is built as a copy of another (a fake score of its teacher), their difference is zero
        at the start, and a loss of zero would pass every check.
        """
        objective = self.built()
        objective = attrs.evolve(objective, **changes) if changes else objective  # type: ignore[misc]
        with torch.no_grad():
            for place, policy in enumerate(trained(objective).values(), 1):
                for parameter in policy.trainable_parameters().values():
                    parameter.add_(0.1 * place)
        return objective

    def batch(self, objective: Objective, index: tuple[int, ...] = (0, 1, 2), constant: bool = False) -> ScoredBatch:
        """Batch of one process in a step on all prompts: the prompts in `index`, with the deviation of the rewards of the whole step."""
        forest = self._forest(objective, index)
        rewards = _scores(forest, constant)
        step = rewards if len(index) == len(PROMPTS) else _scores(self._forest(objective, tuple(range(len(PROMPTS)))), constant)
        deviation = float(step.double().std(unbiased=False))
        return ScoredBatch(forest, rewards, {"r": rewards}, len(index), Progress(2, 10), Streams(1, 2), deviation)

    def _forest(self, objective: Objective, index: tuple[int, ...]) -> TrajectoryBatch:
        policy = objective.behavior()
        condition = policy.encode([PROMPTS[i] for i in index])
        condition = Condition(condition.prompts, torch.tensor(index), condition.tensors)
        with torch.no_grad():
            return self.sampler.sample(policy, condition, Progress(2, 10), Streams(1, 2))


def first_coordinate(images: Tensor, prompts: object) -> Tensor:
    """Reward of images of small policies, as a function of the first number of the latent: [K]."""
    return ((images[:, 0, 0, 0] - 0.5) * 16).sigmoid()


def _named(make: Make) -> str:
    return str(getattr(make, "__name__", "objective"))


def _scores(forest: TrajectoryBatch, constant: bool) -> Tensor:
    rewards = forest.samples.flatten(1)[:, 0].sigmoid().float()
    return torch.full_like(rewards, 0.5) if constant else rewards


def trained(objective: Objective) -> dict[str, Policy]:
    """Trained weights by role, over all phases."""
    return {role: policy for phase in phases_of(objective) for role, policy in phase.trains.items()}


def losses(objective: Objective, batch: ScoredBatch) -> list[tuple[Mapping[str, Policy], Loss]]:
    """Micro-batches of the first update of every phase, with the weights that the phase trains. No weight moves."""
    return [(phase.trains, loss) for phase in phases_of(objective) for loss in yielded(phase, batch, 0)]


def gradients(objective: Objective, batch: ScoredBatch) -> dict[str, Tensor]:
    """Compute the flat gradient of the first update, by role."""
    for policy in everyone(objective).values():
        policy.zero_grad(set_to_none=True)
    for _, loss in losses(objective, batch):
        if loss.value.requires_grad:
            loss.value.backward()
    return {role: _flat(policy) for role, policy in trained(objective).items()}


def _flat(policy: Policy) -> Tensor:
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in policy.trainable_parameters().values()])


def everyone(objective: Objective) -> dict[str, Policy]:
    """Collect the policies of an objective by name: those of a checkpoint, the trained ones as the loop does, the one that rolls out."""
    return {**objective.policies(), **trained(objective), "policy": objective.policy, "behavior": objective.behavior()}


def subject_of(make: Make) -> Subject:
    """Find trajectories that the objective accepts: stochastic trees, else deterministic ones.

    Raises:
        ValueError: it cannot be built from a policy, or refuses every kind of batch.
    """
    prepare_second_device()
    require_from_policy(make)
    refusals: dict[str, str] = {}
    for sampler in SAMPLERS:
        subject = Subject(make, sampler)
        objective = subject.moved()
        try:
            losses(objective, subject.batch(objective))
        except ValueError as error:
            refusals.setdefault(str(error), f"{type(sampler).__name__}: {error}")
        else:
            return subject
    said = next(iter(refusals)) if len(refusals) == 1 else "\n" + "\n".join(refusals.values())
    raise ValueError(f"{_named(make)} refuses every batch it was offered: {said}")
