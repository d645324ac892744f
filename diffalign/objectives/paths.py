"""Paths of a batch with their log-probabilities under the current, the old and the reference weights.

Legend: E stochastic edges, N nodes, K leaves.
"""

from collections.abc import Mapping
from typing import Literal

import attrs
import torch
from torch import Tensor

from diffalign.core import Edges, Policy, Scalar, ScoredBatch, group_sum
from diffalign.core.given import require_part

from .requirements import given_reference, require_weight
from .terms import reference_constraint

Measure = Literal["relative", "path"]
"""Log-probability of a path that is matched: "relative" log p_theta(tau) - log p_ref(tau), or "path" log p_theta(tau)."""

Center = Literal["group", "root", "none"]
"""Baseline of an advantage: the mean over the samples of a prompt ("group"), over those of one root ("root"), or nothing ("none")."""


def reference_for(policy: Policy, reference: Policy | None, measure: Measure, weight: Scalar | float, objective: str) -> Policy | None:
    """Frozen reference that an objective over paths needs: the given one, or a fork of the policy as it is, or None.

    Args:
        weight: weight of a constraint to the reference
        objective: class of the objective in error messages

    Raises:
        ValueError: the policy is none, the weight is negative or not finite, the reference is trainable, or it has no use.
    """
    require_part("policy", policy, Policy)
    if not isinstance(weight, Scalar):
        require_weight(weight, f"{objective}.reference_weight")
    if measure == "path" and weight == 0:
        if reference is not None:
            raise ValueError(
                f"{objective}.reference has no use with measure 'path' and reference_weight 0; leave it out, or take measure 'relative'"
            )
        return None
    return given_reference(policy, reference)


@attrs.frozen(eq=False)
class Paths:
    """Scored batch with the log-probabilities of its edges, in the order of `edges.child`.

    Log-probabilities are in the convention of the kernel (`Gaussian.log_prob`). Multiplied by `nats`, differences between them are those
    of the true density, which is the unit of temperatures and budgets.

    Args:
        batch: trajectories and rewards
        edges: the stochastic edges, sorted by parent
        log_prob: [E] log-probabilities under the current weights, with their gradient
        old: [E] log-probabilities under the weights that rolled out
        nats: [E] nats per unit of a difference of log-probabilities
        reference: [E] log-probabilities under the reference; None if there is none
        numbers: each [E], further numbers that the loss needs from the transitions under the current weights, with their gradient
        unweighted: [E] `log_prob` with the gradient that it has before `level_weights` scale it. No baseline has shrunk the gradient of
            the constraint, which takes these
    """

    batch: ScoredBatch
    edges: Edges
    log_prob: Tensor
    old: Tensor
    nats: Tensor
    reference: Tensor | None
    numbers: Mapping[str, Tensor] = attrs.field(factory=dict)
    unweighted: Tensor = attrs.field()

    @unweighted.default
    def _log_prob(self) -> Tensor:
        return self.log_prob

    @property
    def group(self) -> Tensor:
        """Prompt group of each sample: [K]."""
        return self.batch.trajectories.group

    def total(self, values: Tensor) -> Tensor:
        """Sum over the stochastic edges of each path: [E] -> [K]."""
        trajectories = self.batch.trajectories
        return trajectories.path_sum(values.new_zeros(len(trajectories.latents)).index_copy(0, self.edges.child, values))

    @property
    def steps(self) -> Tensor:
        """Number of stochastic edges of each path: [K]."""
        return self.total(torch.ones_like(self.old))

    def matched(self, measure: Measure) -> Tensor:
        """Log-probability of each path that is matched: "relative" to the reference in nats, or "path" in the kernel's unit: [K]."""
        return self.total(self.log_prob) if measure == "path" else self.drift(self.log_prob)

    def drift(self, log_prob: Tensor) -> Tensor:
        """Difference log p(tau) - log p_ref(tau) in nats, from log-probabilities [E] of the edges: [K]."""
        assert self.reference is not None
        return self.total(self.nats * (log_prob - self.reference))

    def divergence(self) -> Tensor:
        """Sum over the edges of each path of KL(p_theta || p_ref), in closed form, in nats: [K]."""
        return self.total(self.nats * self.numbers["kl"])

    def constraint(self) -> Tensor:
        """Constraint ((log p_theta(tau) - log p_ref(tau)) / steps)^2 of each path: [K]."""
        assert self.reference is not None
        return reference_constraint(self.total(self.unweighted), self.total(self.reference), self.steps)

    def mean_over_groups(self, values: Tensor) -> Tensor:
        """Mean of [K] over the samples of each prompt, and then over the global number of prompts: a scalar."""
        return (values / group_sum(torch.ones_like(values), self.group)).sum() / self.batch.groups

    def average(self, values: Tensor) -> Tensor:
        """Mean over the stochastic edges of each path: [E] -> [K]."""
        return self.total(values) / self.steps.clamp(min=1)

    def share(self) -> Tensor:
        """Share of the prompt's samples that are below each edge, which is its weight in a mean over these samples: [E], float64."""
        share = 1 / torch.bincount(self.group)[self.group].double()
        trajectories = self.batch.trajectories
        inside = trajectories.paths >= 0
        below = share[:, None].expand_as(trajectories.paths)[inside]
        nodes = share.new_zeros(len(trajectories.latents))
        return nodes.index_add(0, trajectories.paths[inside], below)[self.edges.child]

    def level_weights(self, center: Center = "group") -> Tensor:
        """Weight 1 / (1 - n / K) of each edge, for n leaves below it among the K leaves that it is compared with: [E].

        The mean over these K leaves is a baseline that contains the edge's own leaves. This multiplies the expected gradient by 1 - n / K:
        it takes away a third at the first branching of a 3 x 3 x 3 tree, and little at the last. The weight undoes it. Without a baseline
        the weight is 1. An edge that all K leaves share has no gradient, and keeps the weight 1.

        Args:
            center: baseline: with "group" the K leaves are those of the prompt, with "root" those below the edge's root
        """
        trajectories = self.batch.trajectories
        count = len(trajectories.latents)
        on_path = trajectories.paths >= 0
        below = torch.bincount(trajectories.paths[on_path], minlength=count)[self.edges.child]
        if center == "none":
            return torch.ones(len(below), device=below.device)
        if center == "group":
            size = torch.bincount(self.group)[trajectories.prompt[self.edges.child]]
        else:
            root = torch.zeros(count, dtype=torch.long, device=below.device)
            root[trajectories.paths[on_path]] = trajectories.roots[:, None].expand_as(trajectories.paths)[on_path]
            size = torch.bincount(trajectories.roots, minlength=count)[root[self.edges.child]]
        return torch.where(below < size, 1 / (1 - below / size), 1.0)
