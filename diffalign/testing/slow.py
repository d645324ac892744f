"""Simple and slow computation of numbers that the package computes in a faster way, for comparison."""

import attrs
import torch
from torch import Tensor

from diffalign.core import ROOT, Policy, TrajectoryBatch


def path_log_prob(policy: Policy, trajectories: TrajectoryBatch, nats: bool = False) -> Tensor:
    """Log-probability of each leaf's stochastic edges under `policy`: one leaf, one edge and one network row at a time.

    Args:
        policy: policy that gives the transitions
        trajectories: the forest
        nats: take the true density instead of the kernel's convention

    Returns:
        [K], float64, with a graph.
    """
    sums = []
    for leaf in trajectories.leaves.tolist():
        total, child = trajectories.log_prob.new_zeros(()), leaf
        while int(trajectories.parent[child]) != ROOT:
            parent = trajectories.parent[child]
            if trajectories.noise_level[child] > 0:
                level = trajectories.level[parent]
                step = policy.transition(
                    trajectories.latents[parent][None],
                    trajectories.sigmas[level][None],
                    trajectories.sigmas[level + 1][None],
                    trajectories.condition.select(trajectories.prompt[parent][None]),
                    trajectories.noise_level[child][None],
                )
                step = attrs.evolve(step, density="sum") if nats else step
                total = total + step.log_prob(trajectories.latents[child][None])[0]
            child = int(parent)
        sums.append(total)
    return torch.stack(sums)
