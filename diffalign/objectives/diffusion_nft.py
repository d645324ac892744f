"""Negative-aware fine-tuning (NFT) on noised final samples."""

from collections.abc import Iterator

import attrs
import torch
from torch import Tensor

from diffalign.core import Follower, Linear, Loss, Policy, Scalar, ScoredBatch, group_normalize
from diffalign.core.number_fields import finite

from .draws import GridDraws
from .forward import ForwardBatch, ForwardLosses, ForwardObjective
from .noised import Noised, mean_square
from .requirements import optional_reference

_DECAY = Linear(0.0, 0.5, 500)


@attrs.define(eq=False)
class DiffusionNFT(ForwardObjective):
    """Learns to denoise good samples better, and bad samples worse, than the weights that drew them.

        r   = 1/2 + clip(z, -limit, limit) / (2 limit),   z: the reward standardised within its group
        x   = (1 - sigma) x_0 + sigma e,   v = e - x_0
        v+  = (1 - beta) v_old + beta v_theta,   v- = (1 + beta) v_old - beta v_theta
        loss = mean over samples and noise levels of   r d(v+) + (1 - r) d(v-) + kl ||v_theta - v_ref||^2
        d(u) = ||u - v||^2, or with `adaptive` sigma ||u - v||^2 / mean |u - v|, its denominator without gradient; norms are means

    It needs only finished samples, from any sampler, such as `DeterministicSampler`. The fork `old` rolls out. It follows the policy
    after each step, old <- old + (1 - decay) (policy - old). Without `adaptive`, and with old = policy, the gradient is that of
    2 beta (2 r - 1) <v_theta, v_old - v>, so equal rewards move nothing.

    The authors' code multiplies this loss, but not its penalty, by limit / beta: their penalty weight corresponds to kl limit / beta.

    Args:
        policy: the weights being aligned
        reference: frozen; by default a fork of the policy if kl > 0. With kl 0 no reference is allowed
        beta: strength of the implicit guidance, > 0
        decay: share of itself that `old` keeps, in [0, 1]; a number or a schedule. By default from 0 (on policy) to 0.5 in 500 steps
        limit: standardised reward at which r reaches 1 (or 0 at -limit)
        adaptive: divide the error of each prediction by its mean absolute value, as in d(u)
        kl: weight of the penalty, >= 0
        levels: noise levels per sample and update
        sigma_min: least noise level that is drawn from the rollout's grid
        updates: inner updates on the same samples, each with new noise
        rows: (sample, level) pairs per micro-batch of the update; None takes all at once. The gradient does not depend on it

    Raises:
        ValueError: a number is out of range, the reference is trainable, a group has one sample, or the grid has too few noise levels.

    Reference: Zheng et al., arXiv:2509.16117.
    """

    policy: Policy
    reference: Policy | None = None
    beta: float = attrs.field(default=1.0, validator=finite(attrs.validators.gt(0.0)))
    decay: Scalar | float = _DECAY
    limit: float = attrs.field(default=5.0, validator=attrs.validators.gt(0.0))
    adaptive: bool = True
    kl: float = 0.0
    levels: int = attrs.field(default=4, validator=attrs.validators.ge(1))
    sigma_min: float = attrs.field(default=0.0, validator=[attrs.validators.ge(0.0), attrs.validators.le(1.0)])
    updates: int = attrs.field(default=1, validator=attrs.validators.ge(1))
    rows: int | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.ge(1)))
    old: Policy = attrs.field(init=False, repr=False)
    _forward: ForwardLosses = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self.reference = optional_reference(self.policy, self.reference, self.kl, "DiffusionNFT.kl")
        self.old = self.policy.fork()
        self._forward = ForwardLosses(
            self.policy,
            self.old,
            Follower(self.decay, name="DiffusionNFT.decay"),
            GridDraws(self.levels, self.sigma_min, shared=False),
            name="diffusion_nft",
            objective="DiffusionNFT",
        )

    def behavior(self) -> Policy:
        return self.old

    def losses(self, batch: ScoredBatch, update: int) -> Iterator[Loss]:
        forward = self._forward.draw(batch, update, self.rows)
        score = group_normalize(batch.rewards.double(), batch.trajectories.group).clamp(-self.limit, self.limit)
        optimality = (0.5 + score / (2 * self.limit))[forward.sample]
        weight = forward.weight
        yield from forward.apart(lambda noised, units: self._piece(forward, noised, units, optimality[units], weight[units]))

    def _piece(self, forward: ForwardBatch, noised: Noised, units: Tensor, optimality: Tensor, weight: Tensor) -> Loss:
        with torch.no_grad():
            old = noised.velocity(self.old)
        velocity = noised.velocity(self.policy)
        apart = mean_square(velocity.detach() - old)
        forward.samples.require_finite(apart, units, "policy, or of its old weights,")
        per_unit = nft_loss(velocity, old, noised.target, noised.sigma, optimality, self.beta, self.adaptive)
        count = torch.tensor(len(units))
        metrics = {
            "optimality": (optimality.sum(), count),
            "distance/old": (apart.sum(), count),
        }
        if self.reference is not None:
            distance = forward.distance(self.reference, velocity, noised, units)
            per_unit = per_unit + self.kl * distance
            metrics["distance/reference"] = (distance.detach().sum(), count)
        value = (weight * per_unit).sum()
        return Loss(value, {"loss": forward.reported(value, len(units)), **metrics})


def nft_loss(velocity: Tensor, old: Tensor, target: Tensor, sigma: Tensor, optimality: Tensor, beta: float, adaptive: bool) -> Tensor:
    """Loss r d(v+) + (1 - r) d(v-) of each row, see `DiffusionNFT`: [B], float64.

    Args:
        velocity: [B, *] v_theta
        old: [B, *] v_old
        target: [B, *] v
        sigma: [B]
        optimality: [B] r in [0, 1]
        beta: strength of the implicit guidance
        adaptive: divide the error of each prediction by its mean absolute value, as in d(u)
    """
    positive = (1 - beta) * old + beta * velocity - target
    negative = (1 + beta) * old - beta * velocity - target

    def distance(error: Tensor) -> Tensor:
        if not adaptive:
            return mean_square(error)
        size = error.detach().double().flatten(1).abs().mean(dim=1)  # in x_0: sigma^2 |error|^2 / (sigma |error|)
        return sigma.double() * mean_square(error) / size.clamp(min=1e-5)

    return optimality * distance(positive) + (1 - optimality) * distance(negative)
