"""Property of samplers: every stochastic edge has noise of its own."""

import torch
from torch import Tensor

from diffalign.core import ROOT, Policy, TrajectoryBatch
from diffalign.core.transition import expand

from .properties import holds

_APART = 1e-4
"""Least distance of two noises. Equal ones differ by rounding, and others are never so near."""


def require_fresh_noise(policy: Policy, forest: TrajectoryBatch) -> None:
    """Check that no two edges have the same noise, and none has that of a first state. States and log-probs alone would not show it.

    Two first states may be equal: a sampler may start all samples of a prompt from one.

    Args:
        policy: policy that rolled out, whose prior gives the noise itself as the first state
        forest: its forest, with stochastic edges

    Raises:
        AssertionError: two noises are equal; the message names the two nodes.
    """
    roots = (forest.parent == ROOT).nonzero().squeeze(1)
    nodes = torch.cat([roots, forest.stochastic])
    noise = torch.cat([forest.latents[roots].flatten(1), _noise(policy, forest).flatten(1)])
    distance = torch.cdist(noise, noise, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    distance[: len(roots), : len(roots)] = torch.inf
    one, other = (int(nodes[place]) for place in divmod(int(distance.argmin()), len(nodes)))
    holds(
        float(distance.min()) > _APART,
        f"{_named(forest, one)} and {_named(forest, other)} have the same noise. Draw it by a name of the node's own, with its level and "
        "its place in it: `streams.normals(shape, name, prompt ids, node ids)`; the first states must have other node ids than the steps",
    )


def _noise(policy: Policy, forest: TrajectoryBatch) -> Tensor:
    """Noise of each stochastic edge, (state - mean) / std: [E, *]."""
    node = forest.stochastic
    level, still = forest.level[node], torch.zeros_like(forest.mean)
    std = policy.kernel.step(still, still, forest.sigmas[level - 1], forest.sigmas[level], forest.noise_level[node]).std
    return (forest.latents[node] - forest.mean) / expand(std, forest.mean)


def _named(forest: TrajectoryBatch, node: int) -> str:
    kind = "the first state" if int(forest.parent[node]) == ROOT else "node"
    return f"{kind} {node} (prompt {int(forest.prompt[node])}, level {int(forest.level[node])})"
