"""Centered reward distillation: the centred reward as the target of a centred difference of denoising errors."""

from collections.abc import Iterator, Mapping

import attrs
import torch
from torch import Tensor

from diffalign.core import Follower, Linear, Loss, Policy, Scalar, ScoredBatch, group_normalize
from diffalign.core.number_fields import finite

from .draws import GridDraws
from .forward import ForwardBatch, ForwardLosses, ForwardObjective
from .noised import Noised, mean_square
from .requirements import given_reference
from .terms import centered


@attrs.define(eq=False)
class CRD(ForwardObjective):
    """Regresses an implicit reward, the difference of denoising errors to the old weights, onto the reward, both centred in the group.

        R~_i = 1/2 + clip((R_i - mean R) / std R, -limit, limit) / (2 limit)
        d    = mean ||v(x_sigma) - v||^2,   r_i = d_i^old - d_i^theta, with sigma and e shared by the samples of a prompt
        loss = mean [ limit / beta (beta (r_i - mean r) - (R~_i - mean R~))^2 + k_i ||v_theta - v_ref||^2 ]
        k_i  = kl, or with `adaptive` 1e-4 + (kl - 1e-4) R~_i

    The paper's target is old exp(R~ / beta) / Z; Z is the same for all samples of a prompt and cancels. Each level has its own residual, as
    in the code of Flow-Factory, by which the formula was checked. An error at one level is no log-density: the target is the direction, not
    the fixed point, which for N(m, c^2 I) in D dimensions, a linear reward, kl 0 and decay 1 is, level by level (tests),

        v_theta - v_old = D V^2 / (2 sigma^2 c^2) (v_target - v_old),   V = (1 - sigma)^2 c^2 + sigma^2

    far beyond the target where noise is low; levels that share weights compromise by least squares. Elsewhere nothing is proved. Ours are
    the shared levels and noise, and the centring level by level. The old weights follow the policy, which rolls out itself, and take the
    target with them, so that only kl holds it; the authors let a third, slower average roll out.

    Args:
        policy: the weights being aligned
        reference: frozen; by default a fork of the policy as it is when the objective is built. The authors' is guided: a frozen `Guided`
        beta: scale of the implicit reward, > 0
        limit: standardised reward at which R~ reaches 1 (or 0 at -limit)
        decay: share of itself that `old` keeps, in [0, 1]; a number or a schedule. By default from 0.25 to 0.999 in 150 steps
        kl: weight of the distance to the reference, >= 0
        adaptive: weigh the distance of each sample by its reward: little where there is nothing to lose yet
        levels: noise levels per prompt and update
        sigma_min: least noise level that is drawn from the rollout's grid
        updates: inner updates on the same samples, each with new noise
        rows: (sample, level) pairs per micro-batch of the update; None takes all at once

    Raises:
        ValueError: a number is out of range, the reference is trainable, a group has one sample, or the grid has too few noise levels.

    Reference: Zhu et al., arXiv:2603.14128.
    """

    policy: Policy
    reference: Policy | None = None
    beta: float = attrs.field(default=1.0, validator=finite(attrs.validators.gt(0.0)))
    limit: float = attrs.field(default=5.0, validator=attrs.validators.gt(0.0))
    decay: Scalar | float = attrs.field(default=Linear(0.25, 0.999, 150))
    kl: float = attrs.field(default=0.1, validator=finite(attrs.validators.ge(0.0)))
    adaptive: bool = True
    levels: int = attrs.field(default=4, validator=attrs.validators.ge(1))
    sigma_min: float = attrs.field(default=0.0, validator=[attrs.validators.ge(0.0), attrs.validators.le(1.0)])
    updates: int = attrs.field(default=1, validator=attrs.validators.ge(1))
    rows: int | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.ge(1)))
    old: Policy = attrs.field(init=False, repr=False)
    _forward: ForwardLosses = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self.reference = given_reference(self.policy, self.reference)
        self.old = self.policy.fork()
        draws = GridDraws(self.levels, self.sigma_min, shared=True)
        self._forward = ForwardLosses(self.policy, self.old, Follower(self.decay, name="CRD.decay"), draws, "crd", "CRD")

    def losses(self, batch: ScoredBatch, update: int) -> Iterator[Loss]:
        assert self.reference is not None
        forward = self._forward.draw(batch, update, self.rows)
        reference, _ = forward.under(self.reference, "reference")
        old = forward.errors(self.old, "old weights")

        def evaluate(noised: Noised, units: Tensor) -> dict[str, Tensor]:
            velocity = noised.velocity(self.policy)
            return {"error": noised.error(velocity), "distance": mean_square(velocity - reference[units])}

        yield from forward.coupled(evaluate, lambda values: self._loss(forward, values, old))

    def _loss(self, forward: ForwardBatch, values: Mapping[str, Tensor], old: Tensor) -> Loss:
        batch, levels = forward.batch, forward.samples.levels
        forward.samples.require_finite(values["error"], torch.arange(len(forward)), "policy")
        score = group_normalize(batch.rewards.double(), batch.trajectories.group).clamp(-self.limit, self.limit)
        target = (0.5 + score / (2 * self.limit))[forward.sample]
        together = forward.group * levels + torch.arange(len(forward), device=target.device) % levels  # a prompt at one level
        residual = self.beta * centered(old - values["error"], together) - centered(target, together)
        weight = 1e-4 + (self.kl - 1e-4) * target if self.adaptive and self.kl > 0 else torch.full_like(target, self.kl)
        per_unit = self.limit / self.beta * residual.square() + weight * values["distance"]
        value, count = (forward.weight * per_unit).sum(), torch.tensor(len(forward))
        metrics = {"residual": (residual.detach().square().sum(), count), "distance/reference": (values["distance"].detach().sum(), count)}
        return Loss(value, {"loss": forward.reported(value, len(forward)), **metrics})
