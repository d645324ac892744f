"""Trajectory Matching Policy Optimization (TMPO) by Softmax Trajectory Balance."""

from collections.abc import Iterator
from typing import Any, Literal, Self

import attrs
import torch
from torch import Tensor

from diffalign.core import Linear, Loss, Outline, Phase, Policy, Scalar, ScoredBatch
from diffalign.core.words import allowed_word

from .matching import PathMatching
from .path_losses import PathLosses
from .paths import Center, Measure, Paths, reference_for
from .ratio import Ratio, RatioNorm, Shift, shift_numbers
from .requirements import group_has_spread, require_comparable, require_comparable_outline, weight_at
from .temperature import Budget, Temperature
from .terms import centered, clipped_surrogate, effective_share, softmax_tb, tb_residual

_WARM_UP = Linear(0.8, 2.0, 150)
_CLIP = 0.2


@attrs.define(eq=False)
class SoftmaxTB(PathMatching):
    """Matches the policy's probabilities over the K trajectories of a prompt to a reward-induced Boltzmann distribution.

        s_i = sum over stochastic edges of log p_theta - log p_ref, in nats        (measure "relative")
        p = softmax(s),   q = softmax(beta R),   r = log p - log q,   A = -(r - mean r), without gradient
        surrogate:  mean_i w_i max(-A_i rho_i, -A_i clip(rho_i, 1 - clip, 1 + clip)),   rho_i = p_theta(tau_i) / p_old(tau_i)
        squared:    sum_i r_i^2
        plus        reference_weight mean_i ((log p_theta(tau_i) - log p_ref(tau_i)) / steps_i)^2

    Nats are those of the true density; the objective converts from the convention of the kernel. The ratio and the constraint stay in the
    convention of the kernel.

    With the relative measure, the optimum is the tilted reference for each initial noise, p_ref(. | root) exp(beta R) / Z(root). On
    policy, the gradient of the centred surrogate is half that of log-variance (VarGrad) trajectory balance. It equals a group-centred
    policy gradient with reward beta R - log(p / p_ref). The measure "path" leaves the reference out. Its log-probabilities then contribute
    nothing in expectation, so only an advantage of beta R remains; it is there to reproduce the authors' release.

    Args:
        policy: the weights being aligned
        reference: frozen; by default a fork of the policy as it is when the objective is built. With measure "path" there is none unless
            `reference_weight` is positive
        beta: inverse temperature, > 0, in nats of log-probability per unit of aggregated reward; a number, a schedule (`Linear` is the
            paper's warm-up), or a budget that finds it (`KLBudget`, `EffectiveSamples`). 5 to 40 is usual if rewards differ by about 1.
            With measure "path" it has the kernel's unit: nats with density "sum", nats per dimension with "mean"
        measure: see above
        loss: see above. "squared" has no advantage and no trust region: it takes no `clip`, `center`, `ratio` or `ratio_norm`
        clip: half width of the trust region of the ratio; None does not clip
        center: baseline of the advantage. "group": the mean of the group. "root": the mean over the samples of one root, which removes
            the log Z(root) of several roots. "none": no baseline; same mean of the gradient, more variance
        ratio: transforms the log-ratio to the weights that rolled out, before the trust region
        ratio_norm: importance weights w; None takes 1
        reference_weight: weight of the constraint to the reference; a number or a schedule
        level_weights: correct the gradient of edges that many leaves of a group (with center "root": of a root) share, which is too small
            (`Paths.level_weights`)
        updates: inner updates on the same trajectories
        rows: network rows per micro-batch of the update; None takes all at once. The gradient does not depend on it

    Raises:
        ValueError: beta is not positive and finite, `reference_weight` is below 0 or not finite, the reference is trainable, a
            group has one sample, the batch has no stochastic edges, there are several updates with a kernel of density "sum", or settings
            exclude each other.

    Reference: TMPO, arXiv:2605.10983.
    """

    policy: Policy
    reference: Policy | None = None
    beta: Scalar | Budget | float = 20.0
    measure: Measure = attrs.field(default="relative", validator=allowed_word)
    loss: Literal["surrogate", "squared"] = attrs.field(default="surrogate", validator=allowed_word)
    clip: float | None = attrs.field(default=_CLIP, validator=attrs.validators.optional(attrs.validators.gt(0.0)))  # type: ignore[arg-type]
    center: Center = attrs.field(default="group", validator=allowed_word)
    ratio: Ratio = attrs.field(factory=Ratio)
    ratio_norm: RatioNorm | None = None
    reference_weight: Scalar | float = 0.0
    level_weights: bool = False
    updates: int = attrs.field(default=1, validator=attrs.validators.ge(1))
    rows: int | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.ge(1)))
    _replay: PathLosses = attrs.field(init=False, repr=False)
    _temperature: Temperature = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._require_used()
        self._temperature = self._found_temperature()
        self.reference = reference_for(self.policy, self.reference, self.measure, self.reference_weight, "SoftmaxTB")
        summed = self.policy.kernel.density == "sum" and not self.ratio.per_dimension
        if self.updates > 1 and self.loss == "surrogate" and summed:
            raise ValueError(
                f"SoftmaxTB.updates must be 1 if the kernel's log-density is a 'sum'; got {self.updates}. One update moves such a path "
                "by many nats, so every ratio would be clipped: take Ratio(per_dimension=True), or a kernel with density 'mean'."
            )
        numbers = shift_numbers if self.ratio_norm else None
        self._replay = PathLosses(
            self.policy,
            self.reference,
            numbers,
            self.center if self.level_weights else None,
            self.updates,
        )

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
        """Build the losses of the authors' release: path measure, uncentred advantage, centred and limited ratio, RatioNorm.

        Use it with a kernel of density "squared" (CPS) or "mean" (FlowSDE), and z-scored rewards (`StandardizedParts`). Two details follow
        the paper and not the release: the constraint is to the frozen reference, and RatioNorm's bias has the unit of the log-density.

        Args:
            policy: the weights being aligned
            beta: inverse temperature; by default the warm-up from 0.8 to 2 in 150 steps
            clip: half width of the trust region and of the weights
            reference_weight: weight of the constraint to the reference
            updates: inner updates on the same trajectories
            rows: network rows per micro-batch
        """
        settings: dict[str, Any] = {"center": "none", "ratio": Ratio(centered=True, limit=10.0), "ratio_norm": RatioNorm(clip)}
        return cls(policy, beta=beta, measure="path", clip=clip, reference_weight=reference_weight, updates=updates, rows=rows, **settings)

    def _require_used(self) -> None:
        """Refuse settings of the surrogate beside the squared loss, whose residuals are always those of the whole group."""
        given = {
            "clip": self.clip != _CLIP,
            "center": self.center != "group",
            "ratio": self.ratio != Ratio(),
            "ratio_norm": self.ratio_norm is not None,
        }
        unused = [name for name, differs in given.items() if differs]
        if self.loss == "squared" and unused:
            raise ValueError(
                f"SoftmaxTB.{unused[0]} has no use with loss 'squared', which has no advantage and no trust region; leave it out, or take "
                "loss 'surrogate'"
            )

    def phases(self) -> tuple[Phase, ...]:
        return (Phase({"policy": self.policy}, self._losses, self.updates),)

    def require(self, outline: Outline) -> None:
        require_comparable_outline(outline, "SoftmaxTB")
        super().require(outline)

    def _losses(self, batch: ScoredBatch, update: int) -> Iterator[Loss]:
        require_comparable(batch.trajectories, "SoftmaxTB")
        yield from self._replay(batch, update, self.rows, self._loss)

    def _loss(self, paths: Paths) -> Loss:
        batch, group = paths.batch, paths.group
        matched = paths.matched(self.measure)
        beta = self._temperature(batch.progress)
        logits = beta * batch.rewards.double()
        residual = tb_residual(matched, logits, group)
        size = batch.trajectories.latents[0].numel()
        ratio = self.ratio(paths.total(paths.log_prob - paths.old), group, self.policy.kernel.density, size)
        if self.loss == "surrogate":
            advantage = -self._centered(residual, paths).detach()
            per_sample = clipped_surrogate(advantage, ratio, self.clip) * self._weights(paths)
        else:
            per_sample, advantage = softmax_tb(matched, logits, group), -residual
        kept = torch.ones_like(per_sample)
        if self.measure == "path":  # nothing is lost: in such a group the advantage comes only from its own log-probabilities
            kept = group_has_spread(batch.rewards, group).to(kept)
        value = paths.mean_over_groups(per_sample * kept)
        metrics = self._metrics(paths, matched, logits, ratio, advantage, kept, beta)
        weight = weight_at(self.reference_weight, batch.progress, "SoftmaxTB.reference_weight")
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
        outside, share = (ratio.exp() - 1).abs() > (self.clip or float("inf")), effective_share(logits, group)
        return {
            "softmax_tb": (softmax_tb(matched, logits, group).sum(), count),
            "beta": (torch.tensor(beta, dtype=torch.float64), torch.tensor(1)),
            "ratio/mean": (ratio.exp().sum(), count),
            "ratio/clipped": (outside.double().sum(), count),
            "advantage/std": (advantage.std() * count, count),
            "ess/target": (share.sum(), count),
            "ess/policy": (effective_share(matched, group).sum(), count),
            "skipped_groups": ((kept == 0).double().sum(), count),
            **self._distance(paths, matched, logits, share),
        }
