"""Advantage-weighted matching: the loss of pretraining, weighted by the advantage of each sample."""

from collections.abc import Iterator

import attrs
import torch
from torch import Tensor

from diffalign.core import Follower, Loss, Policy, ScoredBatch, group_normalize

from .draws import GridDraws
from .forward import ForwardBatch, ForwardLosses, ForwardObjective
from .guards import KLMask
from .noised import Noised, mean_square
from .requirements import optional_reference
from .terms import clipped_surrogate


@attrs.define(eq=False)
class AWM(ForwardObjective):
    """Denoises good samples better and bad samples worse: flow matching, weighted by the advantage.

        A_i  = clip((R_i - mean R) / std R, -limit, limit) / limit
        d    = mean ||v_theta(x_sigma) - v||^2,   x_sigma = (1 - sigma) x_0 + sigma e,   v = e - x_0
        rho  = exp(d_old - d) on the same noise,  loss = mean max(-A rho, -A clip(rho, 1 - clip, 1 + clip)) + kl mean ||v_theta - v_ref||^2

    On policy rho is 1 and the gradient is that of A d. The log-likelihood -d weighs all levels alike, as pretraining does, and has no unit
    of nats. That gradient is kl times the one of `RAM` with beta = 1 / kl and the reward A, so the fixed point is RAM's,

        v_theta = v_ref + Cov(A, v | x_sigma) / kl

    in large groups the tilt p_ref exp(R / (kl limit std R)) / Z to first order, and exactly for a Gaussian with a linear reward, on which
    the tests check it: the mean moves by 1 / (kl limit) standard deviations, 200 by default, so that the penalty is hardly felt. With kl 0
    the pull ends only where all samples of a prompt have one reward: a sample of low reward is pushed away without end.

    The authors' runs further raise d to the power 1/4, weigh it by sigma, and hold the policy to a moving average; these are not here.

    Args:
        policy: the weights being aligned
        reference: frozen; by default a fork of the policy if kl > 0. With kl 0 no reference is allowed
        limit: standardised reward at which A reaches 1 (or -1 at -limit). The authors' release takes 5
        clip: half width of the trust region of rho; None does not clip. It matters from the second update on
        mask: blocks what is too far from the old weights, in place of the clip; None leaves the clip. Its divergence is
            ||v_theta - v_old||^2 / 2 per dimension, of targets with unit variance
        kl: weight of the penalty, >= 0
        levels: noise levels per sample and update
        sigma_min: least noise level that is drawn from the rollout's grid
        updates: inner updates on the same samples, each with new noise. With 1 the old policy is the policy, and costs nothing
        rows: (sample, level) pairs per micro-batch of the update; None takes all at once. The gradient does not depend on it

    Raises:
        ValueError: a number is out of range, the reference is trainable, a group has one sample, or the grid has too few noise levels.

    Reference: Xue et al., arXiv:2509.25050.
    """

    policy: Policy
    reference: Policy | None = None
    limit: float = attrs.field(default=5.0, validator=attrs.validators.gt(0.0))
    clip: float | None = attrs.field(default=0.2, validator=attrs.validators.optional(attrs.validators.gt(0.0)))  # type: ignore[arg-type]
    mask: KLMask | None = None
    kl: float = 0.001
    levels: int = attrs.field(default=4, validator=attrs.validators.ge(1))
    sigma_min: float = attrs.field(default=0.0, validator=[attrs.validators.ge(0.0), attrs.validators.le(1.0)])
    updates: int = attrs.field(default=1, validator=attrs.validators.ge(1))
    rows: int | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.ge(1)))
    old: Policy | None = attrs.field(default=None, init=False, repr=False)
    _forward: ForwardLosses = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self.reference = optional_reference(self.policy, self.reference, self.kl, "AWM.kl")
        self.old = self.policy.fork() if self.updates > 1 else None
        draws = GridDraws(self.levels, self.sigma_min, shared=True)
        self._forward = ForwardLosses(self.policy, self.old, Follower(0.0), draws, "awm", "AWM")

    def losses(self, batch: ScoredBatch, update: int) -> Iterator[Loss]:
        forward = self._forward.draw(batch, update, self.rows)
        score = group_normalize(batch.rewards.double(), batch.trajectories.group)
        advantage = (score.clamp(-self.limit, self.limit) / self.limit)[forward.sample]
        yield from forward.apart(lambda noised, units: self._piece(forward, noised, units, advantage[units]))

    def _piece(self, forward: ForwardBatch, noised: Noised, units: Tensor, advantage: Tensor) -> Loss:
        velocity = noised.velocity(self.policy)
        error = noised.error(velocity)
        forward.samples.require_finite(error, units, "policy")
        with torch.no_grad():
            old = velocity.detach() if self.old is None else noised.velocity(self.old)
        log_ratio, apart = noised.error(old) - error, mean_square(velocity.detach() - old)
        if self.mask is None:
            per_unit = clipped_surrogate(advantage, log_ratio, self.clip)
        else:
            per_unit = self.mask.surrogate(advantage, log_ratio, apart / 2)
        count = torch.tensor(len(units))
        metrics = {"error": (error.detach().sum(), count), "distance/old": (apart.sum(), count)}
        if self.reference is not None:
            distance = forward.distance(self.reference, velocity, noised, units)
            per_unit = per_unit + self.kl * distance
            metrics["distance/reference"] = (distance.detach().sum(), count)
        value = (forward.weight[units] * per_unit).sum()
        return Loss(value, {"loss": forward.reported(value, len(units)), **metrics})
