"""Replay of stored edges under the current weights, and exact micro-batches for losses that couple many samples.

Siblings share their parent's state, so one velocity row serves all of them: a 3x3x3 tree has 27 leaves and 39 edges, and replays in
1 + 3 + 9 = 13 rows.
"""

from collections.abc import Callable, Iterator, Mapping

import attrs
import torch
from torch import Tensor

from .policy import Policy
from .transition import Gaussian
from .types import Loss, TrajectoryBatch

Values = Mapping[str, Tensor]


@attrs.frozen(eq=False)
class Edges:
    """Stochastic edges of a forest, sorted by parent.

    Args:
        child: [E] nodes, edges of one parent contiguous
        parent: [U] their distinct parents
        owner: [E] index into `parent`
        row: [E] index into `TrajectoryBatch.mean`
        counts: [U] edges out of each parent, on the host
        prompts: [U] prompt of each parent, on the host
    """

    child: Tensor
    parent: Tensor
    owner: Tensor
    row: Tensor
    counts: Tensor
    prompts: Tensor

    @classmethod
    def of(cls, trajectories: TrajectoryBatch) -> "Edges":
        child = trajectories.stochastic
        parent, owner = torch.unique(trajectories.parent[child], return_inverse=True)
        row = owner.argsort(stable=True)
        counts, prompts = torch.stack([torch.bincount(owner, minlength=len(parent)), trajectories.prompt[parent]]).cpu()
        return cls(child[row], parent, owner[row], row, counts, prompts)

    @property
    def first(self) -> Tensor:
        """Place of the first edge out of each parent, [U]. Sigma and noise level are the same for its siblings."""
        return (self.counts.cumsum(0) - self.counts).to(self.owner.device, non_blocking=True)

    def below(self, parents: Tensor) -> "Edges":
        """Select the edges of some parents: sorted indices into `parent`, best on the host, so that the device is not waited for."""
        parents = parents.cpu()
        ends = self.counts.cumsum(0)
        counts = self.counts[parents]
        if len(parents) and int(parents[-1]) - int(parents[0]) + 1 == len(parents):  # consecutive parents: slices need no copies
            low, high = int(parents[0]), int(parents[-1]) + 1
            mine: slice | Tensor = slice(int(ends[low] - self.counts[low]), int(ends[high - 1]))
            chosen: slice | Tensor = slice(low, high)
        else:
            stretches = [torch.arange(end - count, end) for end, count in zip(ends[parents].tolist(), counts.tolist(), strict=True)]
            device = self.parent.device
            mine = (torch.cat(stretches) if stretches else parents).to(device, non_blocking=True)
            chosen = parents.to(device, non_blocking=True)
        owner = torch.arange(len(parents)).repeat_interleave(counts).to(self.owner.device, non_blocking=True)
        return Edges(self.child[mine], self.parent[chosen], owner, self.row[mine], counts, self.prompts[parents])


def replay_parents(policy: Policy, trajectories: TrajectoryBatch, edges: Edges) -> Gaussian:
    """Transition out of each parent under the weights of `policy`: one network call of len(edges.parent) rows.

    Returns:
        mean [U, *], std [U] in the order of `edges.parent`.

    Raises:
        ValueError: there is no edge.
    """
    parent = edges.parent
    if not len(parent):
        raise ValueError(
            "replay needs stochastic edges, but there is none here: a sampler without noise draws deterministic trajectories alone, which "
            "have no log-probability. Take TreeSampler or ChainSampler, whose steps have an eta > 0; an objective refuses other samplers "
            "in its `require`."
        )
    level, eta = trajectories.level[parent], trajectories.noise_level[edges.child[edges.first]]
    return policy.transition(
        trajectories.latents[parent],
        trajectories.sigmas[level],
        trajectories.sigmas[level + 1],
        trajectories.condition.select(edges.prompts),
        eta,
    )


def replay(policy: Policy, trajectories: TrajectoryBatch, edges: Edges) -> Gaussian:
    """Replay the transition of each edge: mean [E, *], std [E] in the order of `edges.child`. Siblings share a network row."""
    return replay_parents(policy, trajectories, edges).select(edges.owner)


def replay_log_prob(policy: Policy, trajectories: TrajectoryBatch, edges: Edges) -> Tensor:
    """Log-probability of each edge under the weights of `policy`, in the order of `edges.child`: [E], float64."""
    return replay(policy, trajectories, edges).log_prob(trajectories.latents[edges.child])


def micro_batched(
    evaluate: Callable[[Tensor], Values],
    count: int,
    loss_of: Callable[[Values], Loss],
    rows: int | None,
    known: Values | None = None,
) -> Iterator[Loss]:
    """Yield losses whose gradients add up to that of `loss_of(evaluate(all units))`, in the memory of `rows` units at a time.

    `loss_of` may couple all values. Pass 1 evaluates all units without a graph and computes c = dL/d(values). Pass 2 evaluates them
    again, in pieces with a graph, and yields sum(c * values); by the chain rule these have the gradient of L. If all units fit one
    piece, the loss itself is yielded and nothing is evaluated twice.

    Args:
        evaluate: sorted unit indices, on the host -> values by name, each [n, ...]. The values of the pieces, one after the other, must
            be those of all units. Pass 1 keeps all of them, so give numbers, not latents
        count: number of units; each is one network row
        loss_of: all values -> loss; its metrics are reported once
        rows: units per piece; None takes all at once
        known: the values of pass 1, if the caller has them already
    """
    if rows is not None and rows < 1:
        raise ValueError(f"rows must be at least 1, or None for all at once; got {rows}")
    units = torch.arange(count)
    pieces = units.split(count if rows is None else rows)
    if len(pieces) <= 1:
        yield loss_of(evaluate(units))
        return
    if known is None:
        with torch.no_grad():
            parts = [evaluate(piece) for piece in pieces]
        known = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    leaves = {name: value.detach().requires_grad_() for name, value in known.items()}
    loss = loss_of(leaves)
    gradients = torch.autograd.grad(loss.value, list(leaves.values()), allow_unused=True)
    weights = {name: gradient for name, gradient in zip(leaves, gradients, strict=True) if gradient is not None}
    metrics, start = loss.metrics, 0
    for piece in pieces:
        values = evaluate(piece)
        stop = start + len(next(iter(values.values())))
        value = sum((weight[start:stop] * values[name]).sum() for name, weight in weights.items())
        start = stop
        yield Loss(torch.as_tensor(value), metrics)
        metrics = {}
