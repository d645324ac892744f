"""Shared code of losses over whole trajectories: replays a batch under the current, the old and the reference weights, in pieces.

Legend: U parents, E stochastic edges.
"""

from collections.abc import Callable, Iterator, Mapping

import attrs
import torch
from torch import Tensor

from diffalign.core import (
    Edges,
    Gaussian,
    Loss,
    Policy,
    ScoredBatch,
    TrajectoryBatch,
    TransitionKernel,
    micro_batched,
    replay,
    replay_log_prob,
    replay_parents,
)
from diffalign.core.words import allowed_word

from .paths import Center, Paths
from .requirements import require_finite

EdgeNumbers = Callable[[TrajectoryBatch, Edges, Gaussian], Mapping[str, Tensor]]
"""Function that computes further numbers from the transitions of some edges, by name, each [E]. The numbers of all edges are kept; the
transitions are as large as latents, so they are freed after each micro-batch."""


@attrs.frozen(eq=False)
class ReferenceSteps:
    """Transitions of the reference along the edges of a batch.

    Args:
        log_prob: [E] log-probabilities under the reference
        parent: [U] nodes from which the edges go out
        steps: its transitions out of these nodes; None if no divergence is needed. They take as much memory as a part of the forest (a
            sixth for 3 x 3 x 3), but without them each pass would evaluate the reference again
    """

    log_prob: Tensor
    parent: Tensor
    steps: Gaussian | None

    def divergence(self, edges: Edges, transition: Gaussian) -> Tensor:
        """Divergence KL(p_theta || p_ref) of some edges: [E], with its gradient, in the convention of the log-density."""
        assert self.steps is not None
        return gaussian_kl(transition, self.steps.select(torch.searchsorted(self.parent, edges.parent)[edges.owner]))


@attrs.frozen(eq=False)
class Known:
    """Numbers of a batch that the first update computes and later updates need.

    Args:
        trajectories: trajectories of the batch
        reference: transitions of the reference; None if the loss has no reference
        old: [E] log-probabilities under the weights that rolled out; None in the first update, which computes them
    """

    trajectories: TrajectoryBatch
    reference: ReferenceSteps | None
    old: Tensor | None = None


@attrs.define(eq=False)
class PathLosses:
    """Replays a batch and yields the micro-batches of a loss over its paths.

    Args:
        policy: policy that is trained
        reference: frozen; None if the loss has no reference
        numbers: computes what the loss needs from the transitions beside their log-probabilities
        level_weights: centre of the loss, by which `Paths.level_weights` weighs the gradient of each edge; None does not weigh
        updates: inner updates on the same trajectories
        divergence: whether the loss needs the closed-form divergence from the reference, as the number "kl" of each edge
    """

    policy: Policy
    reference: Policy | None
    numbers: EdgeNumbers | None = None
    level_weights: Center | None = attrs.field(default=None, validator=allowed_word)
    updates: int = 1
    divergence: bool = False
    _known: Known | None = attrs.field(default=None, init=False, repr=False)  # of the batch, from its first update to its last

    def __call__(self, batch: ScoredBatch, update: int, rows: int | None, loss_of: Callable[[Paths], Loss]) -> Iterator[Loss]:
        """Yield micro-batches of `loss_of`, whose gradients add up to the gradient of the whole loss.

        The old log-probabilities are computed in the first update, in the same pieces as the new ones. So every ratio of the first update
        is exactly 1, and later updates compare calls of equal shape. Rounding between the rollout's calls and these does not enter.

        Args:
            batch: one batch from its update 0 on
            update: index of the update of this batch
            rows: network rows per micro-batch; None takes all at once
            loss_of: function from the paths of the batch to the loss
        """
        trajectories = batch.trajectories
        edges = Edges.of(trajectories)
        if update == 0:
            self._known = Known(trajectories, self._of_reference(trajectories, edges, rows))
        known = self._known
        if known is None or known.trajectories is not trajectories:
            raise RuntimeError(f"update {update} of a batch needs the numbers of update 0 of the same batch; take its losses first")
        nats = nats_of(self.policy.kernel, trajectories, edges)
        first: list[Tensor] = []  # log-probs of the pieces of this update

        def evaluate(parents: Tensor) -> dict[str, Tensor]:
            some = edges.below(parents)
            values = self._numbers_of(known.reference, trajectories, some, replay(self.policy, trajectories, some))
            if torch.is_grad_enabled():
                first.append(values["log_prob"].detach())
            return values

        def whole(values: Mapping[str, Tensor]) -> Loss:
            return loss_of(self._paths(batch, known, edges, nats, values))

        if update == 0 and trajectories.mean.requires_grad:  # the rollout kept the graph of its branching steps
            old = self._old(trajectories, edges, rows) if self.updates > 1 else None
            yield whole(self._numbers_of(known.reference, trajectories, edges, _from_rollout(self.policy, trajectories, edges)))
            self._known = attrs.evolve(known, old=old)
            return
        count = len(edges.parent)
        known_already = update == 0 and rows is not None and rows < count and self._is_known(trajectories)
        rolled = self._of_rollout(known.reference, trajectories, edges, rows) if known_already else None
        yield from micro_batched(evaluate, count, whole, rows, rolled)
        if update == 0:
            self._known = attrs.evolve(known, old=torch.cat(first) if first else None)  # no first under no_grad, where no update follows

    def forget(self) -> None:
        """Free the numbers of a batch: the reference's steps are as large as latents."""
        self._known = None

    def _is_known(self, trajectories: TrajectoryBatch) -> bool:
        """True if the rollout's transitions can serve as those of the first update, so that its pass without gradient is not needed.

        They were made in calls of other sizes, so rounding differs. In half precision the difference can be larger than a ratio may be, and
        a summed density adds up the rounding of all dimensions. Otherwise it is at most 1e-6.
        """
        exact = min(self.policy.precision.itemsize, trajectories.latents.dtype.itemsize) >= 4
        return exact and self.policy.kernel.density != "sum"

    @torch.no_grad()
    def _of_rollout(
        self, reference: ReferenceSteps | None, trajectories: TrajectoryBatch, edges: Edges, rows: int | None
    ) -> dict[str, Tensor]:
        """Compute the numbers of all edges from the transitions that the rollout kept: they cost no network row."""
        parts = [
            self._numbers_of(reference, trajectories, some, _from_rollout(self.policy, trajectories, some)) for some in _pieces(edges, rows)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _numbers_of(
        self, reference: ReferenceSteps | None, trajectories: TrajectoryBatch, edges: Edges, transition: Gaussian
    ) -> dict[str, Tensor]:
        """Compute the numbers that are kept of some edges."""
        numbers = {"log_prob": transition.log_prob(trajectories.latents[edges.child])}
        if self.numbers is not None:
            numbers |= self.numbers(trajectories, edges, transition)
        if self.divergence and reference is not None:
            numbers["kl"] = reference.divergence(edges, transition)
        return numbers

    def _paths(self, batch: ScoredBatch, known: Known, edges: Edges, nats: Tensor, values: Mapping[str, Tensor]) -> Paths:
        log_prob = values["log_prob"]
        require_finite(log_prob, batch.trajectories, edges.child, "trained weights")
        old = log_prob.detach() if known.old is None else known.old
        paths = Paths(batch, edges, log_prob, old, nats, None if known.reference is None else known.reference.log_prob, values)
        if self.level_weights is None:
            return paths
        fixed = log_prob.detach()
        return attrs.evolve(paths, log_prob=fixed + paths.level_weights(self.level_weights) * (log_prob - fixed))

    @torch.no_grad()
    def _of_reference(self, trajectories: TrajectoryBatch, edges: Edges, rows: int | None) -> ReferenceSteps | None:
        """Evaluate the reference once per batch, in the same pieces as the updates."""
        if self.reference is None:
            return None
        steps, log_probs = [], []
        for some in _pieces(edges, rows):
            step = replay_parents(self.reference, trajectories, some)
            log_probs.append(step.select(some.owner).log_prob(trajectories.latents[some.child]))
            if self.divergence:
                steps.append(step)
        log_prob = torch.cat(log_probs)
        require_finite(log_prob, trajectories, edges.child, "reference")
        if not steps:
            return ReferenceSteps(log_prob, edges.parent, None)
        whole = attrs.evolve(steps[0], mean=torch.cat([step.mean for step in steps]), std=torch.cat([step.std for step in steps]))
        return ReferenceSteps(log_prob, edges.parent, whole)

    @torch.no_grad()
    def _old(self, trajectories: TrajectoryBatch, edges: Edges, rows: int | None) -> Tensor:
        """Log-probabilities under the present weights, in the same pieces as the updates: [E]."""
        log_prob = torch.cat([replay_log_prob(self.policy, trajectories, some) for some in _pieces(edges, rows)])
        require_finite(log_prob, trajectories, edges.child, "trained weights")
        return log_prob


def nats_of(kernel: TransitionKernel, trajectories: TrajectoryBatch, edges: Edges) -> Tensor:
    """Nats per unit of a difference of log-densities, for some edges: [E], float64.

    "sum" 1        "mean" D        "squared" D / (2 std^2)
    """
    size = trajectories.latents[0].numel()
    if kernel.density != "squared":
        unit = 1.0 if kernel.density == "sum" else float(size)
        return trajectories.log_prob.new_full((), unit, dtype=torch.float64).expand(len(edges.child))
    return size / (2 * _still(kernel, trajectories, edges, trajectories.latents[:1]).std.double().square())


def gaussian_kl(policy: Gaussian, reference: Gaussian) -> Tensor:
    """Divergence KL(p || q) = E_p[log p - log q] of each row, in the convention of the log-density: [B], float64, with a gradient.

    "sum"      ||m_p - m_q||^2 / (2 s_q^2) + D (ln(s_q / s_p) + s_p^2 / (2 s_q^2) - 1/2)
    "mean"     that divided by D
    "squared"  ||m_p - m_q||^2 / D
    """
    squares = (policy.mean - reference.mean).flatten(1).square().sum(dim=1, dtype=torch.float64)
    size = policy.mean[0].numel()
    if policy.density == "squared":
        return squares / size
    own, other = policy.std.double(), reference.std.double()
    spread = (other / own).log() + own.square() / (2 * other.square()) - 0.5
    total = squares / (2 * other.square()) + size * spread
    return total if policy.density == "sum" else total / size


def _pieces(edges: Edges, rows: int | None) -> Iterator[Edges]:
    """The edges, as many at a time as one network call takes."""
    count = len(edges.parent)
    return map(edges.below, torch.arange(count).split(rows or count))


def _from_rollout(policy: Policy, trajectories: TrajectoryBatch, edges: Edges) -> Gaussian:
    """Take the replay of all edges from the graph of the rollout, which costs no network row."""
    mean = trajectories.mean[edges.row]
    return attrs.evolve(_still(policy.kernel, trajectories, edges, mean), mean=mean)


def _still(kernel: TransitionKernel, trajectories: TrajectoryBatch, edges: Edges, like: Tensor) -> Gaussian:
    """Transitions of some edges at latents 0 with velocity 0. Their standard deviation is right, because it depends on neither."""
    level = trajectories.level[edges.child]
    nothing = like.new_zeros(len(level), *(1,) * (like.ndim - 1))
    return kernel.step(nothing, nothing, trajectories.sigmas[level - 1], trajectories.sigmas[level], trajectories.noise_level[edges.child])
