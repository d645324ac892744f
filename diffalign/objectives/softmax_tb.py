"""Trajectory Matching Policy Optimization."""

from collections.abc import Iterator
from typing import Any, Literal, Self

import attrs
import torch
from torch import Tensor

from diffalign.core import Linear, Loss, Outline, Phase, Policy, Scalar, ScoredBatch, scalar

from .matching import PathMatching
from .path_losses import PathLosses
from .paths import Center, Measure, Paths, reference_for
from .ratio import Ratio, RatioNorm, Shift, shift_numbers
from .requirements import group_has_spread, require_comparable, require_comparable_outline
from .temperature import Budget, Temperature
from .terms import centered, clipped_surrogate, effective_share, softmax_tb, tb_residual

_WARM_UP = Linear(0.8, 2.0, 150)


@attrs.define(eq=False)
class SoftmaxTB(PathMatching):
    """Matches the policy's probabilities over the K trajectories of a prompt to a reward-induced Boltzmann distribution.

        s_i = sum over stochastic edges of log p_theta - log p_ref, in nats        (measure "relative")
        p = softmax(s),   q = softmax(beta R),   r = log p - log q,   A = -(r - mean r), without gradient
        surrogate:  mean_i w_i max(-A_i rho_i, -A_i clip(rho_i, 1 - clip, 1 + clip)),   rho_i = p_theta(tau_i) / p_old(tau_i)
        squared:    sum_i r_i^2
        plus        reference_weight mean_i ((log p_theta(tau_i) - log p_ref(tau_i)) / steps_i)^2

    Nats are those of the true density, whatever the convention of the kernel: the objective converts. The ratio and the constraint are in
    the convention of the kernel.

    With the relative measure the optimum is the tilt of the reference per initial noise, p_ref(. | root) exp(beta R) / Z(root). On
    policy the centred surrogate has half the gradient of log-variance (VarGrad) trajectory balance, and that of a group-centred policy
    gradient with reward beta R - log(p / p_ref). The measure "path" leaves the reference out; in expectation its log-probabilities then
    contribute nothing, and what remains is an advantage of beta R: it is here for parity with the authors' release.

    Args:
        policy: the weights being aligned
        reference: frozen; by default a fork of the policy as it is when the objective is built. "path" takes none unless
            `reference_weight` is positive
        beta: inverse temperature, > 0, in nats of log-probability per unit of aggregated reward; a number, a schedule (`Linear` is the
            papers' warm-up), or a budget that finds it (`KLBudget`, `EffectiveSamples`). 5 to 40 is usual where rewards differ by about 1.
            Under the measure "path" its unit is the kernel's: nats with density "sum", nats per dimension with "mean"
        measure: see above
        loss: see above
        clip: half width of the trust region of the ratio; None does not clip
        center: what the advantage is counted from: the mean of the group; "root", the samples of one root in it (which takes out the
            log Z(root) of several roots); "siblings", the samples below the other branches of the same node, edge by edge, which takes out
            all that happened before the node; "none" leaves the gradient with more variance and the same mean
        pull: how the reference pulls. "sampled" is -s_i in the advantage, as above. "closed" takes its expectation over the noise of each
            step, the divergence of two Gaussians: sum_e KL(p_theta(e) || p_ref(e)) in place of s_i and as a term of the loss. Same
            expected gradient on policy, less noise (Rao-Blackwell); needs the measure "relative" and the loss "surrogate"
        ratio: how the log-ratio to the weights that rolled out enters the trust region
        ratio_norm: importance weights w; None takes 1
        reference_weight: weight of the constraint to the reference; a number or a schedule
        level_weights: undo the shrinking of the gradient at edges that many leaves of a group share, or of a root where that is the
            centre (`Paths.level_weights`); "siblings" shrinks nothing
        updates: inner updates on the same trajectories
        rows: network rows per micro-batch of the update; None takes all at once. The gradient does not depend on it

    Raises:
        ValueError: beta that is not positive and finite, a reference that could move, a group of one sample, a batch without stochastic
            edges, several updates with the ratio of a summed log-density, choices that exclude each other.

    Reference: TMPO, arXiv:2605.10983.
    """

    policy: Policy
    reference: Policy | None = None
    beta: Scalar | Budget | float = 20.0
    measure: Measure = "relative"
    loss: Literal["surrogate", "squared"] = "surrogate"
    clip: float | None = attrs.field(default=0.2, validator=attrs.validators.optional(attrs.validators.gt(0.0)))  # type: ignore[arg-type]
    center: Center = "group"
    pull: Literal["sampled", "closed"] = "sampled"
    ratio: Ratio = attrs.field(factory=Ratio)
    ratio_norm: RatioNorm | None = None
    reference_weight: Scalar | float = 0.0
    level_weights: bool = False
    updates: int = attrs.field(default=1, validator=attrs.validators.ge(1))
    rows: int | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.ge(1)))
    _replay: PathLosses = attrs.field(init=False, repr=False)
    _temperature: Temperature = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._temperature = self._found_temperature()
        self._require_compatible()
        self.reference = reference_for(self.policy, self.reference, self.measure, self.reference_weight, "SoftmaxTB")
        summed = self.policy.kernel.density == "sum" and not self.ratio.per_dimension
        if self.updates > 1 and self.loss == "surrogate" and summed:
            raise ValueError(
                f"SoftmaxTB.updates must be 1 where the kernel's log-density is a 'sum'; got {self.updates}. One update moves such a path "
                "by many nats, so every ratio would be clipped: take Ratio(per_dimension=True), or a kernel with density 'mean'."
            )
        numbers = shift_numbers if self.ratio_norm else None
        self._replay = PathLosses(
            self.policy,
            self.reference,
            self.rows,
            numbers,
            self._baseline if self.level_weights else None,
            self.updates,
            self.pull == "closed",
        )

    def _require_compatible(self) -> None:
        """Refuse choices that exclude each other."""
        if self.pull == "closed" and (self.measure, self.loss) != ("relative", "surrogate"):
            raise ValueError(
                f"SoftmaxTB.pull 'closed' needs measure 'relative' and loss 'surrogate'; got {self.measure!r} and {self.loss!r}. Take "
                "pull 'sampled'."
            )
        if self.center != "siblings":
            return
        if self.loss == "squared" or self.ratio_norm is not None or self.ratio.centered:
            raise ValueError(
                "SoftmaxTB.center 'siblings' has an advantage for each step, so it needs the loss 'surrogate', no ratio_norm and no "
                "Ratio(centered=True). Take center 'group'."
            )
        if self.level_weights:
            raise ValueError("SoftmaxTB.level_weights must be False with center 'siblings', which shrinks nothing")

    @classmethod
    def release_compatible(
        cls,
        policy: Policy,
        beta: Scalar | float = _WARM_UP,
        clip: float = 0.2,
        reference_weight: float = 0.0,
        updates: int = 1,
        rows: int | None = None,
    ) -> Self:
        """The losses of the authors' release: path measure, uncentred advantage, centred and limited ratio, RatioNorm.

        It takes a kernel with density "squared" (CPS) or "mean" (FlowSDE), and z-scored rewards (`StandardizedParts`). Two things are as
        published and not as released: the constraint is to the frozen reference, and RatioNorm's bias has the units of the log-density.

        Args:
            policy: the weights being aligned
            beta: inverse temperature; by default the warm-up from 0.8 to 2 in 150 steps
            clip: half width of the trust region and of the weights
            reference_weight: of the constraint to the reference
            updates: inner updates on the same trajectories
            rows: network rows per micro-batch
        """
        settings: dict[str, Any] = {"center": "none", "ratio": Ratio(centered=True, limit=10.0), "ratio_norm": RatioNorm(clip)}
        return cls(policy, beta=beta, measure="path", clip=clip, reference_weight=reference_weight, updates=updates, rows=rows, **settings)

    @property
    def _baseline(self) -> Center:
        """Whose mean the gradient is counted from: squared residuals are the group's own, and know no other centre."""
        return "group" if self.loss == "squared" else self.center

    def phases(self) -> tuple[Phase, ...]:
        return (Phase({"policy": self.policy}, self._losses, self.updates),)

    def require(self, outline: Outline) -> None:
        require_comparable_outline(outline, "SoftmaxTB")

    def _losses(self, batch: ScoredBatch, update: int) -> Iterator[Loss]:
        require_comparable(batch.trajectories, "SoftmaxTB")
        yield from self._replay(batch, update, self._loss)

    def _loss(self, paths: Paths) -> Loss:
        batch, group = paths.batch, paths.group
        matched = paths.matched(self.measure)
        beta = self._temperature(batch.progress)
        logits = beta * batch.rewards.double()
        residual = tb_residual(paths.divergence() if self.pull == "closed" else matched, logits, group)
        size = batch.trajectories.latents[0].numel()
        ratio = self.ratio(paths.total(paths.log_prob - paths.old), group, self.policy.kernel.density, size)
        if self.center == "siblings":
            advantage = -paths.over_siblings(residual.detach())  # [E]
            step = self.ratio(paths.log_prob - paths.old, group, self.policy.kernel.density, size)
            per_sample = paths.total(clipped_surrogate(advantage, step, self.clip))
        elif self.loss == "surrogate":
            advantage = -self._centered(residual, paths).detach()
            per_sample = clipped_surrogate(advantage, ratio, self.clip) * self._weights(paths)
        else:
            per_sample, advantage = softmax_tb(matched, logits, group), -residual
        kept = torch.ones_like(per_sample)
        if self.measure == "path":  # nothing is lost: a group without spread has no advantage but that of its own log-probs
            kept = group_has_spread(batch.rewards, group).to(kept)
        value = paths.mean_over_groups(per_sample * kept)
        if self.pull == "closed":
            value = value + paths.mean_over_groups(paths.total(self._pulled(paths)))
        metrics = self._metrics(paths, matched, logits, ratio, advantage, kept, beta)
        weight = scalar(self.reference_weight)(batch.progress)
        if weight > 0:
            constraint = paths.constraint()
            value = value + weight * paths.mean_over_groups(constraint)
            metrics["reference_constraint"] = (constraint.sum(), metrics["softmax_tb"][1])
        return Loss(value, {"loss": (value.detach() * batch.groups, torch.tensor(len(batch.trajectories.condition))), **metrics})

    def _centered(self, residual: Tensor, paths: Paths) -> Tensor:
        if self.center == "none":
            return residual
        if self.center == "group":
            return centered(residual, paths.group)
        _, root, size = paths.batch.trajectories.roots.unique(return_inverse=True, return_counts=True)
        if int(size.min()) < 2:
            raise ValueError(
                "SoftmaxTB.center 'root' needs at least 2 samples of each root; one has a single sample. Take center 'group' for chains."
            )
        return centered(residual, root)

    def _pulled(self, paths: Paths) -> Tensor:
        """The closed divergence of each edge as the advantage weighs it, [E]: a baseline that holds the edge's own leaves shrinks both."""
        kl = paths.numbers["kl"]
        whole = self.level_weights or self.center == "siblings"
        return kl if whole else kl / paths.level_weights(self._baseline).to(kl)

    def _weights(self, paths: Paths) -> Tensor | float:
        if self.ratio_norm is None:
            return 1.0
        size = paths.batch.trajectories.latents[0].numel()
        shift = Shift(paths.numbers["squares"], paths.numbers["std"], self.policy.kernel.density, size)
        return self.ratio_norm.weights_of(shift, paths.log_prob - paths.old, paths.average)

    @torch.no_grad()
    def _metrics(
        self, paths: Paths, matched: Tensor, logits: Tensor, ratio: Tensor, advantage: Tensor, kept: Tensor, beta: float
    ) -> dict[str, tuple[Tensor, Tensor]]:
        group, count = paths.group, torch.tensor(len(paths.group))
        outside = (ratio.exp() - 1).abs() > (self.clip or float("inf"))
        return {
            "softmax_tb": (softmax_tb(matched, logits, group).sum(), count),
            "beta": (torch.tensor(beta, dtype=torch.float64), torch.tensor(1)),
            "ratio/mean": (ratio.exp().sum(), count),
            "ratio/clipped": (outside.double().sum(), count),
            "advantage/std": (advantage.std() * count, count),
            "ess/target": (effective_share(logits, group).sum(), count),
            "ess/policy": (effective_share(matched, group).sum(), count),
            "skipped_groups": ((kept == 0).double().sum(), count),
            **self._distance(paths, matched, logits),
        }
