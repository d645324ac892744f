"""Trajectory Matching Policy Optimization."""

from collections.abc import Iterator, Mapping
from typing import Literal

import attrs
import torch
from torch import Tensor

from diffalign.core import (
    Edges,
    Loss,
    Objective,
    Phase,
    Policy,
    Scalar,
    ScoredBatch,
    TrajectoryBatch,
    group_sum,
    micro_batched,
    replay_log_prob,
    require_frozen,
    scalar,
)

from .terms import centered, clipped_surrogate, effective_share, softmax_tb, tb_residual


@attrs.define(eq=False)
class SoftmaxTB(Objective):
    """Matches the policy's probabilities over the K trajectories of a prompt to a reward-induced Boltzmann distribution.

        s_i = sum over stochastic edges of log p_theta - log p_ref        (measure "relative")
        p = softmax(s),   q = softmax(beta R),   r = log p - log q,   A = -(r - mean r), without gradient
        surrogate:  mean_i max(-A_i rho_i, -A_i clip(rho_i, 1 - clip, 1 + clip)),   rho_i = p_theta(tau_i) / p_old(tau_i)
        squared:    sum_i r_i^2

    With the relative measure the optimum is the tilt of the reference per initial noise, p_ref(. | root) exp(beta R) / Z(root). On
    policy the centred surrogate has half the gradient of log-variance (VarGrad) trajectory balance, and that of a group-centred policy
    gradient with reward beta R - log(p / p_ref). The measure "path" leaves the reference out; in expectation its log-probabilities then
    contribute nothing, and what remains is an advantage of beta R: it is here for parity with the authors' release.

    Args:
        policy: the weights being aligned
        reference: frozen; by default a fork of the policy as it is when the objective is built. "path" takes none
        beta: inverse temperature, > 0, in units of 1 / (aggregated reward); a number or a schedule
        measure: see above
        loss: see above
        clip: half width of the trust region of the ratio; None does not clip
        center: subtract the group's mean from the advantage; without it the gradient only gains variance
        updates: inner updates on the same trajectories
        rows: network rows per micro-batch of the update; None takes all at once. The gradient does not depend on it

    Raises:
        ValueError: beta <= 0, a reference that could move, a group of one sample, a batch without stochastic edges.

    Reference: TMPO, arXiv:2605.10983.
    """

    policy: Policy
    reference: Policy | None = None
    beta: Scalar | float = 4.0
    measure: Literal["relative", "path"] = "relative"
    loss: Literal["surrogate", "squared"] = "surrogate"
    clip: float | None = attrs.field(default=0.2, validator=attrs.validators.optional(attrs.validators.gt(0.0)))  # type: ignore[arg-type]
    center: bool = True
    updates: int = attrs.field(default=1, validator=attrs.validators.ge(1))
    rows: int | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.ge(1)))
    _reference_log_prob: Tensor | None = attrs.field(default=None, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        if isinstance(self.beta, int | float) and self.beta <= 0:
            raise ValueError(f"SoftmaxTB.beta must be positive: it is an inverse temperature; got {self.beta:g}")
        if self.measure == "path" and self.reference is not None:
            raise ValueError("SoftmaxTB.reference has no use with measure 'path'; leave it out, or take measure 'relative'")
        if self.measure == "relative" and self.reference is None:
            self.reference = self.policy.fork()
        if self.reference is not None:
            require_frozen(self.reference, "reference")

    def phases(self) -> tuple[Phase, ...]:
        return (Phase({"policy": self.policy}, self._losses, self.updates),)

    def policies(self) -> Mapping[str, Policy]:
        return {"policy": self.policy} if self.reference is None else {"policy": self.policy, "reference": self.reference}

    def _losses(self, batch: ScoredBatch, update: int) -> Iterator[Loss]:
        trajectories = batch.trajectories
        require_comparable(trajectories, "SoftmaxTB")
        edges = Edges.of(trajectories)
        if update == 0:
            self._reference_log_prob = self._replay_reference(trajectories, edges)
        old = trajectories.log_prob[edges.child]

        def evaluate(parents: Tensor) -> dict[str, Tensor]:
            return {"log_prob": replay_log_prob(self.policy, trajectories, edges.below(parents))}

        def loss_of(values: Mapping[str, Tensor]) -> Loss:
            return self._loss(batch, edges, values["log_prob"], old)

        # with float32 latents the rollout's log-probs are the replay's, so the first pass of the first update is already there
        known = {"log_prob": old} if update == 0 and trajectories.latents.dtype == torch.float32 else None
        yield from micro_batched(evaluate, len(edges.parent), loss_of, self.rows, known)

    def _replay_reference(self, trajectories: TrajectoryBatch, edges: Edges) -> Tensor | None:
        """[E] log-probs of the edges under the reference, or None where the measure has none."""
        if self.reference is None:
            return None
        with torch.no_grad():
            pieces = torch.arange(len(edges.parent)).split(self.rows or len(edges.parent))
            return torch.cat([replay_log_prob(self.reference, trajectories, edges.below(piece)) for piece in pieces])

    def _loss(self, batch: ScoredBatch, edges: Edges, log_prob: Tensor, old: Tensor) -> Loss:
        trajectories, group = batch.trajectories, batch.trajectories.group

        def path(values: Tensor) -> Tensor:
            return trajectories.path_sum(values.new_zeros(len(trajectories.latents)).index_copy(0, edges.child, values))

        reference = self._reference_log_prob
        ratio = path(log_prob if reference is None else log_prob - reference)  # [K] s
        beta = scalar(self.beta)(batch.progress)
        logits = beta * batch.rewards.double()
        residual = tb_residual(ratio, logits, group)
        log_ratio = path(log_prob - old)
        if self.loss == "surrogate":
            advantage = -(centered(residual, group) if self.center else residual).detach()
            per_sample = clipped_surrogate(advantage, log_ratio, self.clip)
        else:
            per_sample, advantage = softmax_tb(ratio, logits, group), -residual
        share = 1 / group_sum(per_sample.new_ones(len(group)), group)
        if reference is None:  # nothing is lost: a group without spread has no advantage but that of its own log-probs
            spread = group_sum(centered(batch.rewards.double(), group).abs(), group) > 0
            share = share * spread
        value = (per_sample * share).sum() / batch.groups
        with torch.no_grad():
            count = torch.tensor(len(group))
            outside = (log_ratio.exp() - 1).abs() > (self.clip or float("inf"))
            metrics = {
                "loss": (value * batch.groups, torch.tensor(trajectories.condition.ids.numel())),
                "softmax_tb": (softmax_tb(ratio, logits, group).sum(), count),
                "beta": (torch.tensor(beta), torch.tensor(1)),
                "ratio/mean": (log_ratio.exp().sum(), count),
                "ratio/clipped": (outside.double().sum(), count),
                "advantage/std": (advantage.std() * count, count),
                "ess/target": (effective_share(logits, group).sum(), count),
                "ess/policy": (effective_share(ratio, group).sum(), count),
                "skipped_groups": ((share == 0).double().sum(), count),
            }
            if reference is not None:
                metrics["log_ratio/reference"] = (ratio.sum(), count)
        return Loss(value, metrics)


def require_comparable(trajectories: TrajectoryBatch, objective: str) -> None:
    """Refuse a batch that an objective over stochastic trajectories cannot use.

    Raises:
        ValueError: no stochastic edge, or a prompt with a single sample.
    """
    if not len(trajectories.stochastic):
        raise ValueError(
            f"{objective} needs stochastic steps, but every edge of this batch is deterministic. Give the plan an eta > 0, or use an "
            "objective for deterministic trajectories."
        )
    sizes = torch.bincount(trajectories.group, minlength=len(trajectories.condition))
    alone = (sizes < 2).nonzero().squeeze(1)
    if len(alone):
        prompt = str(trajectories.condition.prompts[int(alone[0])])
        raise ValueError(
            f"{objective} needs at least 2 samples per prompt to compare; prompt {prompt!r} has {int(sizes[alone[0]])}. Use a plan with a "
            "branching step or more roots."
        )
