"""Forward-KL variant of Softmax Trajectory Balance."""

from collections.abc import Iterator

import attrs
import torch

from diffalign.core import Loss, Outline, Phase, Policy, Scalar, ScoredBatch
from diffalign.core.words import allowed_word

from .matching import PathMatching
from .path_losses import PathLosses
from .paths import Measure, Paths, reference_for
from .requirements import group_has_spread, require_comparable, require_comparable_outline, weight_at
from .temperature import Budget, Temperature
from .terms import effective_share, group_forward_kl


@attrs.define(eq=False)
class GroupForwardKL(PathMatching):
    """Moves the policy's softmax over the K trajectories of a prompt to the Boltzmann distribution of their rewards, in forward KL.

        s_i = sum over stochastic edges of log p_theta (- log p_ref, in nats, with measure "relative")
        p = softmax(s),   q = softmax(beta R)
        loss = KL(q || p) = sum_i q_i (log q_i - log p_i),        dL/ds_i = p_i - q_i
        plus   reference_weight mean_i ((log p_theta(tau_i) - log p_ref(tau_i)) / steps_i)^2

    The gradient weighs every sample by at most 1, so one sample of high reward cannot make a step too large. It is an on-policy estimate,
    so each batch is used for one update. With measure "path", as in `SoftmaxTB`, the policy's own log-probabilities contribute nothing on
    average, and only q remains.

    Args:
        policy: the weights being aligned
        reference: frozen; by default a fork of the policy as it is when the objective is built. With measure "path" there is none unless
            `reference_weight` is positive
        beta: inverse temperature, > 0, in nats of log-probability per unit of aggregated reward, for every log-density of the kernel. A
            number, a schedule, or a budget that finds it (`KLBudget`, `EffectiveSamples`). With measure "path" it has the kernel's unit
        measure: see above
        reference_weight: weight of the constraint to the reference; a number or a schedule
        spread: groups with max R - min R <= spread are skipped with measure "path"; with "relative" they still pull towards the reference
        level_weights: correct the gradient of edges that many leaves of a group share, which is too small (`Paths.level_weights`)
        rows: network rows per micro-batch of the update; None takes all at once. The gradient does not depend on it

    Raises:
        ValueError: beta is not positive and finite, `reference_weight` is below 0 or not finite, the reference is trainable, a
            group has one sample, or the batch has no stochastic edges.

    Reference: Uni-TMPO, arXiv:2609.34688.
    """

    policy: Policy
    reference: Policy | None = None
    beta: Scalar | Budget | float = 20.0
    measure: Measure = attrs.field(default="relative", validator=allowed_word)
    reference_weight: Scalar | float = 0.0
    spread: float = attrs.field(default=0.0, validator=attrs.validators.ge(0.0))
    level_weights: bool = False
    rows: int | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.ge(1)))
    _replay: PathLosses = attrs.field(init=False, repr=False)
    _temperature: Temperature = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._temperature = self._found_temperature()
        self.reference = reference_for(self.policy, self.reference, self.measure, self.reference_weight, "GroupForwardKL")
        self._replay = PathLosses(self.policy, self.reference, level_weights="group" if self.level_weights else None)

    def phases(self) -> tuple[Phase, ...]:
        return (Phase({"policy": self.policy}, self._losses),)

    def require(self, outline: Outline) -> None:
        require_comparable_outline(outline, "GroupForwardKL")
        super().require(outline)

    def _losses(self, batch: ScoredBatch, update: int) -> Iterator[Loss]:
        require_comparable(batch.trajectories, "GroupForwardKL")
        yield from self._replay(batch, update, self.rows, self._loss)

    def _loss(self, paths: Paths) -> Loss:
        batch, group = paths.batch, paths.group
        matched = paths.matched(self.measure)
        beta = self._temperature(batch.progress)
        logits = beta * batch.rewards.double()
        divergence = group_forward_kl(matched, logits, group)
        skips = self.measure == "path"
        kept = group_has_spread(batch.rewards, group, self.spread).double() if skips else torch.ones_like(divergence)
        value = paths.mean_over_groups(kept * divergence)
        count, share = torch.tensor(len(group)), effective_share(logits, group)
        metrics = {
            "forward_kl": (divergence.detach().sum(), count),
            "beta": (torch.tensor(beta, dtype=torch.float64), torch.tensor(1)),
            "ess/target": (share.sum(), count),
            "ess/policy": (effective_share(matched.detach(), group).sum(), count),
            "skipped_groups": ((kept == 0).double().sum(), count),
            **self._distance(paths, matched, logits, share),
        }
        if paths.reference is not None:
            weight = weight_at(self.reference_weight, batch.progress, "GroupForwardKL.reference_weight")
            if weight > 0:
                constraint = paths.constraint()
                value = value + weight * paths.mean_over_groups(constraint)
                metrics["reference_constraint"] = (constraint.detach().sum(), count)
        return Loss(value, {"loss": (value.detach() * batch.groups, torch.tensor(len(batch.trajectories.condition))), **metrics})
