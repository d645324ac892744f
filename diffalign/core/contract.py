"""The first-step contract: before the first update, replay reproduces the rollout."""

import torch

from .errors import ContractError
from .policy import Policy
from .replay import Edges, replay
from .transition import expand
from .types import TrajectoryBatch

TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""Largest |mean - rollout mean| / std by the dtype that the network computes in. Rollout and replay differ in batch shape only."""


@torch.no_grad()
def first_step_deviation(policy: Policy, trajectories: TrajectoryBatch, parents: int, tolerance: float) -> float:
    """Replay the edges of a few parents, spread over the forest, and compare means in units of the std.

    Means, because a summed log-density of 65,536 dimensions cannot be compared itself: one ulp of it is 4e-3.

    Args:
        policy: the one that rolled out, with the same weights
        trajectories: its forest
        parents: network rows to spend
        tolerance: largest deviation allowed

    Returns:
        max |mean - rollout mean| / std over the edges looked at; 0 where the forest has no stochastic edge.

    Raises:
        ContractError: the deviation is larger, naming level and sigma: log-prob ratios would be wrong before the first update.
    """
    edges = Edges.of(trajectories)
    if not len(edges.child):
        return 0.0
    chosen = torch.linspace(0, len(edges.parent) - 1, min(parents, len(edges.parent))).round().long().unique()
    edges = edges.below(chosen.to(edges.parent.device))
    again = replay(policy, trajectories, edges)
    rollout = trajectories.mean[edges.row]
    deviation = ((again.mean - rollout).abs() / expand(again.std, rollout)).flatten(1).amax(dim=1)
    worst = int(deviation.argmax())
    largest = float(deviation[worst])
    if not largest <= tolerance:
        child = edges.child[worst]
        level = int(trajectories.level[trajectories.parent[child]])
        raise ContractError(
            f"first-step contract: replayed and rolled-out means must agree to {tolerance:g} std before the first update; they differ "
            f"by {largest:.3g} std at level {level} (sigma {trajectories.sigmas[level].item():.4g} -> "
            f"{trajectories.sigmas[level + 1].item():.4g}). The policy is not the same function in rollout and replay: look for "
            "dropout, a changed mode or dtype, caches, or a wrong noise level."
        )
    return largest
