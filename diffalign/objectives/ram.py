"""Reinforce adjoint matching: regression of the velocity onto that of the reference, corrected by the reward."""

from collections.abc import Iterator

import attrs
import torch
from torch import Tensor

from diffalign.core import Follower, Loss, Policy, ScoredBatch
from diffalign.core.number_fields import finite

from .draws import GridDraws
from .forward import ForwardBatch, ForwardLosses, ForwardObjective
from .noised import Noised, mean_square
from .requirements import given_reference
from .terms import centered


@attrs.define(eq=False)
class RAM(ForwardObjective):
    """Regresses the velocity onto the reference's, corrected by the reward of the sample that was noised.

        loss = mean ||v_theta(x_sigma) - sg[ v_ref(x_sigma) + beta (R - mean R) (v - v_theta(x_sigma)) ]||^2
        x_sigma = (1 - sigma) x_0 + sigma e,   v = e - x_0,   x_0 from the policy

    On policy v_theta is the mean of v given x_sigma, so a baseline of R changes nothing in the mean, and the fixed point is

        v_theta = v_ref + beta Cov(R, v | x_sigma)

    The tilt p_b = p_ref exp(b R) / Z has dv_b / db = Cov_b(R, v | x_sigma). So the fixed point is the tilt at b = beta if the covariance
    does not change on the way from 0 to beta: always for small beta, and exactly for a Gaussian with a linear reward, on which the tests
    check it. For larger beta it is one step of the rectangle rule: the paper leaves out the same term (its path cost).

    The loss is the paper's (equation 17), confirmed by two public implementations; that the reward is centred in the group is ours.

    Args:
        policy: the weights being aligned
        reference: frozen; by default a fork of the policy as it is when the objective is built
        beta: inverse temperature, > 0, in nats per unit of aggregated reward; the paper's multiplier of the reward
        levels: noise levels per sample and update
        sigma_min: least noise level that is drawn from the rollout's grid
        updates: inner updates on the same samples, each with new noise
        rows: (sample, level) pairs per micro-batch of the update; None takes all at once. The gradient does not depend on it

    Raises:
        ValueError: a number is out of range, the reference is trainable, a group has one sample, or the grid has too few noise levels.

    Reference: Bergmeister et al., arXiv:2605.10759.
    """

    policy: Policy
    reference: Policy | None = None
    beta: float = attrs.field(default=1.0, validator=finite(attrs.validators.gt(0.0)))
    levels: int = attrs.field(default=4, validator=attrs.validators.ge(1))
    sigma_min: float = attrs.field(default=0.0, validator=[attrs.validators.ge(0.0), attrs.validators.le(1.0)])
    updates: int = attrs.field(default=1, validator=attrs.validators.ge(1))
    rows: int | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.ge(1)))
    old: Policy | None = attrs.field(default=None, init=False, repr=False)
    _forward: ForwardLosses = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self.reference = given_reference(self.policy, self.reference)
        self._forward = ForwardLosses(self.policy, None, Follower(0.0), GridDraws(self.levels, self.sigma_min, shared=False), "ram", "RAM")

    def losses(self, batch: ScoredBatch, update: int) -> Iterator[Loss]:
        forward = self._forward.draw(batch, update, self.rows)
        strength = self.beta * centered(batch.rewards.double(), batch.trajectories.group)[forward.sample]
        yield from forward.apart(lambda noised, units: self._piece(forward, noised, units, strength[units]))

    def _piece(self, forward: ForwardBatch, noised: Noised, units: Tensor, strength: Tensor) -> Loss:
        assert self.reference is not None
        with torch.no_grad():
            reference = noised.velocity(self.reference)
        velocity = noised.velocity(self.policy)
        wide = strength.to(velocity.dtype).reshape(-1, *(1,) * (velocity.ndim - 1))
        target = reference + wide * (noised.target - velocity.detach()).to(velocity.dtype)
        distance, apart = mean_square(velocity - target), mean_square(velocity.detach() - reference)
        forward.samples.require_finite(distance, units, "policy, or of its reference,")
        value, count = (forward.weight[units] * distance).sum(), torch.tensor(len(units))
        return Loss(value, {"loss": forward.reported(value, len(units)), "distance/reference": (apart.sum(), count)})
