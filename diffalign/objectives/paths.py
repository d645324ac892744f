"""What losses over whole trajectories share: log-probabilities of paths under the current, the old and the reference weights.

Legend: E stochastic edges, N nodes, K leaves.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import attrs
import torch
from torch import Tensor

from diffalign.core import (
    Edges,
    Gaussian,
    Loss,
    Policy,
    Scalar,
    ScoredBatch,
    TrajectoryBatch,
    group_sum,
    micro_batched,
    replay,
    replay_log_prob,
    require_frozen,
)

from .requirements import require_finite
from .terms import reference_constraint

Measure = Literal["relative", "path"]
"""Which log-probability of a path is matched: log p_theta(tau) - log p_ref(tau), or log p_theta(tau)."""

Center = Literal["group", "root", "none"]
"""What an advantage is counted from: the mean over the samples of a prompt, over those of one root among them, or nothing."""

EdgeNumbers = Callable[[TrajectoryBatch, Edges, Gaussian], Mapping[str, Tensor]]
"""What a loss needs of the transitions of some edges beside their log-probabilities, by name, each [E]: numbers, because those of all edges
are kept, while transitions, which are as large as latents, live no longer than a micro-batch."""


def reference_for(policy: Policy, reference: Policy | None, measure: Measure, weight: Scalar | float, objective: str) -> Policy | None:
    """The frozen reference that an objective over paths needs: the one given, or a fork of the policy as it is, or none.

    Args:
        weight: of a constraint to the reference
        objective: its class, for messages

    Raises:
        ValueError: a reference that could move, or that has no use.
    """
    if measure == "path" and not isinstance(weight, Scalar) and weight <= 0:
        if reference is not None:
            raise ValueError(
                f"{objective}.reference has no use with measure 'path' and reference_weight 0; leave it out, or take measure 'relative'"
            )
        return None
    reference = policy.fork() if reference is None else reference
    require_frozen(reference, "reference")
    return reference


@attrs.frozen(eq=False)
class Paths:
    """A scored batch and the log-probabilities of its edges, in the order of `edges.child`.

    Args:
        batch: trajectories and rewards
        edges: the stochastic edges, sorted by parent
        log_prob: [E] under the current weights, with their gradient
        old: [E] under the weights that rolled out
        reference: [E] under the reference; None where there is none
        numbers: each [E], what the loss asked for of the transitions under the current weights, with their gradient
    """

    batch: ScoredBatch
    edges: Edges
    log_prob: Tensor
    old: Tensor
    reference: Tensor | None
    numbers: Mapping[str, Tensor] = attrs.field(factory=dict)

    @property
    def group(self) -> Tensor:
        """[K] prompt group of each sample."""
        return self.batch.trajectories.group

    def total(self, values: Tensor) -> Tensor:
        """Sum over the stochastic edges of each path: [E] -> [K]."""
        trajectories = self.batch.trajectories
        return trajectories.path_sum(values.new_zeros(len(trajectories.latents)).index_copy(0, self.edges.child, values))

    @property
    def steps(self) -> Tensor:
        """[K] stochastic edges of each path."""
        return self.total(torch.ones_like(self.old))

    def matched(self, measure: Measure) -> Tensor:
        """[K] the log-probability of each path that is compared: relative to the reference, or as it is."""
        if measure == "path":
            return self.total(self.log_prob)
        assert self.reference is not None
        return self.total(self.log_prob - self.reference)

    def constraint(self) -> Tensor:
        """[K] ((log p_theta(tau) - log p_ref(tau)) / steps)^2."""
        assert self.reference is not None
        return reference_constraint(self.total(self.log_prob), self.total(self.reference), self.steps)

    def mean_over_groups(self, values: Tensor) -> Tensor:
        """The mean of [K] over the samples of each prompt, and over the global number of prompts: a scalar."""
        return (values / group_sum(torch.ones_like(values), self.group)).sum() / self.batch.groups

    def average(self, values: Tensor) -> Tensor:
        """Mean over the stochastic edges of each path: [E] -> [K]."""
        return self.total(values) / self.steps.clamp(min=1)

    def level_weights(self, center: Center = "group") -> Tensor:
        """1 / (1 - n / K) of each edge, for n leaves below it among the K that it is compared with: [E].

        The mean over these K is a baseline that contains the edge's own leaves, which shrinks its expected gradient by 1 - n / K: by a
        third at the first branching of a 3 x 3 x 3 tree, hardly at the last. Without a baseline nothing shrinks. An edge that all K
        share has no gradient to restore, and keeps the weight 1.

        Args:
            center: whose mean it is: K are the leaves of the prompt, or those of the root that the edge comes from
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


@attrs.define(eq=False)
class PathLosses:
    """Replays a batch and yields the micro-batches of a loss over its paths.

    Args:
        policy: whose gradient is taken
        reference: frozen; None where the loss has none
        rows: network rows per micro-batch; None takes all at once
        numbers: what the loss needs of the transitions, beside their log-probabilities
        level_weights: weigh the gradient of each edge by `Paths.level_weights` for the loss's centre; None does not
        updates: inner updates on the same trajectories
    """

    policy: Policy
    reference: Policy | None
    rows: int | None
    numbers: EdgeNumbers | None = None
    level_weights: Center | None = None
    updates: int = 1
    _reference: Tensor | None = attrs.field(default=None, init=False, repr=False)
    _old: Tensor | None = attrs.field(default=None, init=False, repr=False)

    def __call__(self, batch: ScoredBatch, update: int, loss_of: Callable[[Paths], Loss]) -> Iterator[Loss]:
        """Micro-batches of `loss_of`, whose gradients add up to that of the whole.

        The old log-probabilities are those of the first update's own pieces, so that every ratio of the first update is 1 exactly, and
        those of later ones compare calls of equal shape. Rounding between the calls of the rollout and these cannot enter a ratio.
        """
        trajectories = batch.trajectories
        edges = Edges.of(trajectories)
        if update == 0:
            self._old = None
            self._reference = None if self.reference is None else self._under(self.reference, trajectories, edges, "reference")
        first: list[Tensor] = []  # log-probs of the pieces of this update

        def evaluate(parents: Tensor) -> dict[str, Tensor]:
            some = edges.below(parents)
            values = self._numbers_of(trajectories, some, replay(self.policy, trajectories, some))
            if torch.is_grad_enabled():
                first.append(values["log_prob"].detach())
            return values

        def whole(values: Mapping[str, Tensor]) -> Loss:
            return loss_of(self._paths(batch, update, edges, values))

        if update == 0 and trajectories.mean.requires_grad:  # the rollout kept the graph of its branching steps
            if self.updates > 1:
                self._old = self._under(self.policy, trajectories, edges, "trained weights")
            yield whole(self._numbers_of(trajectories, edges, _from_rollout(self.policy, trajectories, edges)))
            return
        count = len(edges.parent)
        known = {"log_prob": trajectories.log_prob[edges.child]} if update == 0 and self._is_known(trajectories) else None
        yield from micro_batched(evaluate, count, whole, self.rows, known)
        if update == 0:
            self._old = torch.cat(first) if first else None  # none under no_grad, where nobody asks for a further update

    def _is_known(self, trajectories: TrajectoryBatch) -> bool:
        """Whether the rollout's log-probs serve as those of the first update, so that its pass without gradient is left out.

        They were made in calls of other sizes. In half precision that may change a path by more than a ratio may, and a summed density adds
        up the rounding of all dimensions; else it is 1e-6 at most.
        """
        exact = min(self.policy.precision.itemsize, trajectories.latents.dtype.itemsize) >= 4
        return self.numbers is None and exact and self.policy.kernel.density != "sum"

    def _numbers_of(self, trajectories: TrajectoryBatch, edges: Edges, transition: Gaussian) -> dict[str, Tensor]:
        """All that is kept of some edges."""
        log_prob = transition.log_prob(trajectories.latents[edges.child])
        more = {} if self.numbers is None else self.numbers(trajectories, edges, transition)
        return {"log_prob": log_prob, **more}

    def _paths(self, batch: ScoredBatch, update: int, edges: Edges, values: Mapping[str, Tensor]) -> Paths:
        log_prob = values["log_prob"]
        require_finite(log_prob, batch.trajectories, edges.child, "trained weights")
        old = log_prob.detach() if update == 0 else self._old
        assert old is not None  # the first update went before
        paths = Paths(batch, edges, log_prob, old, self._reference, values)
        if self.level_weights is None:
            return paths
        fixed = log_prob.detach()
        return attrs.evolve(paths, log_prob=fixed + paths.level_weights(self.level_weights) * (log_prob - fixed))

    def _under(self, policy: Policy, trajectories: TrajectoryBatch, edges: Edges, whose: str) -> Tensor:
        """[E] log-probs of the edges under some weights, without gradient, in the pieces of the updates."""
        with torch.no_grad():
            pieces = torch.arange(len(edges.parent)).split(self.rows or len(edges.parent))
            log_prob = torch.cat([replay_log_prob(policy, trajectories, edges.below(piece)) for piece in pieces])
        require_finite(log_prob, trajectories, edges.child, whose)
        return log_prob


def _from_rollout(policy: Policy, trajectories: TrajectoryBatch, edges: Edges) -> Gaussian:
    """What a replay would give, from the graph of the rollout: no network row."""
    mean = trajectories.mean[edges.row]
    level = trajectories.level[edges.child]
    eta = trajectories.noise_level[edges.child]
    nothing = mean.new_zeros(len(mean), *(1,) * (mean.ndim - 1))  # the standard deviation does not depend on state or velocity
    still = policy.kernel.step(nothing, nothing, trajectories.sigmas[level - 1], trajectories.sigmas[level], eta)
    return attrs.evolve(still, mean=mean)
