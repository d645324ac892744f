"""Ways of doing one TMPO step on any policy, and how they are measured: shared by the costs `tmpo_step` and `families`."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from diffalign.core import Condition, Policy, Progress, ScoredBatch, Streams, TrajectoryBatch
from diffalign.objectives import SoftmaxTB
from diffalign.samplers import Branching, TreeSampler, roll_out

SUB_BATCH = 9
"""Leaves per call in the update of TMPO's release."""

Rollout = Callable[[], ScoredBatch]
Update = Callable[[ScoredBatch], None]


def scored(trajectories: TrajectoryBatch) -> ScoredBatch:
    """With rewards that rise from 0 to 1."""
    rewards = torch.linspace(0, 1, len(trajectories.leaves), device=trajectories.latents.device)
    return ScoredBatch(trajectories, rewards, {"r": rewards}, len(trajectories.condition), Progress(0, 1), Streams(0))


def ours(policy: Policy, condition: Condition, sampler: TreeSampler, **options: Any) -> tuple[Rollout, Update]:
    """TreeSampler and SoftmaxTB, which takes the options."""
    objective = SoftmaxTB(policy, measure="path", **options)

    def rollout() -> ScoredBatch:
        with torch.no_grad():
            return scored(sampler.sample(policy, condition, Progress(0, 1), Streams(0)))

    def update(batch: ScoredBatch) -> None:
        for loss in objective.phases()[0].losses(batch, 0):
            loss.value.backward()
        policy.zero_grad(set_to_none=True)

    return rollout, update


def branch_by_branch(policy: Policy, condition: Condition, branching: Branching, sub_batch: int = SUB_BATCH) -> tuple[Rollout, Update]:
    """Every branch forwarded alone, and every stochastic step of every leaf evaluated, the graph of all kept, as TMPO's release does."""

    def rollout() -> ScoredBatch:
        with torch.no_grad():
            return scored(roll_out(policy, condition, branching, Streams(0), rows=1))

    def update(batch: ScoredBatch) -> None:
        forest = batch.trajectories
        noisy = forest.noise_level[forest.paths] > 0
        total = torch.zeros(len(forest.leaves), dtype=torch.float64, device=forest.latents.device)
        for some in torch.arange(len(forest.leaves), device=total.device).split(sub_batch):
            for step in range(forest.paths.shape[1]):
                child = forest.paths[some, step]
                if not bool(noisy[some, step].all()):
                    continue
                parent = forest.parent[child]
                level = forest.level[parent]
                rows = forest.condition.select(forest.prompt[parent])
                transition = policy.transition(
                    forest.latents[parent], forest.sigmas[level], forest.sigmas[level + 1], rows, forest.noise_level[child]
                )
                total = total.index_add(0, some, transition.log_prob(forest.latents[child]))
        (-(batch.rewards.double() * (total - total.detach()).exp()).mean()).backward()
        policy.zero_grad(set_to_none=True)

    return rollout, update


def measured(policy: Policy, rollout: Rollout, update: Update) -> dict[str, float]:
    """Network rows, calls and seconds of one rollout and of the update that follows it."""
    batch, first = _measured(policy, "rollout", rollout)
    _, second = _measured(policy, "update", partial(update, batch))
    return first | second


def _measured(policy: Policy, name: str, work: Callable) -> tuple[ScoredBatch, dict[str, float]]:
    rows, calls = policy.counter.rows, policy.counter.calls
    synchronize(policy.device)
    start = time.perf_counter()
    result = work()
    synchronize(policy.device)
    seconds = time.perf_counter() - start
    return result, {f"{name}_rows": policy.counter.rows - rows, f"{name}_calls": policy.counter.calls - calls, f"{name}_s": seconds}


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
