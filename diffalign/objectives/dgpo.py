"""Direct group preference optimisation: prefers the group of good samples to the group of bad ones."""

from collections.abc import Iterator, Mapping
from typing import Literal

import attrs
import torch
from torch import Tensor

from diffalign.core import (
    Follower,
    Linear,
    Loss,
    Policy,
    Scalar,
    ScoredBatch,
    group_normalize,
    group_sum,
)
from diffalign.core.number_fields import finite
from diffalign.core.words import allowed_word

from .draws import GridDraws
from .forward import ForwardBatch, ForwardLosses, ForwardObjective
from .noised import Noised, mean_square
from .requirements import given_reference

RECENT = Linear(0.0, 0.3, 300)
"""Share of themselves that old weights keep."""


@attrs.define(eq=False)
class DGPO(ForwardObjective):
    """Prefers the better samples of a prompt to the worse ones, all at once, by their denoising errors.

        A_i = (R_i - mean R) / std R over the group of G samples
        x   = (1 - sigma) x_0 + sigma e,   v = e - x_0,   sigma and e shared by the samples of a prompt
        d_i = mean ||v_theta - v||^2,  D_i = d_i - d_i^ref,   S = beta / G sum_i A_i D_i
        "weighted":  mean_i sigmoid(S) A_i d_i, the sigmoid without gradient
        "softplus":  softplus(S) = -log sigmoid(-S), whose gradient is beta times that
        plus         kl mean ||v_theta - v_ref||^2

    The advantages of a group sum to zero, which cancels the partition function of the implicit reward -D. With "weighted", beta sets how
    soon the weight sigmoid(S) leaves 1/2, not the size of the step.

    A ratio keeps the policy near the recent one: with rho_i = exp(d_i^old - d_i), a sample with A_i > 0 and rho_i > 1 + clip, or with
    A_i <= 0 and rho_i < 1 - clip, has no gradient. `old` follows the policy after each step, old <- old + (1 - decay) (policy - old).

    It needs only finished samples, from any sampler, such as `DeterministicSampler`. With a large `sigma_min` the policy does not learn
    the blur of a few-step sampler.

    Args:
        policy: the weights being aligned
        reference: frozen; by default a fork of the policy as it is when the objective is built
        beta: sharpness, > 0, in units of 1 / (d - d_ref). The authors take 10 to 100 for images, whose errors differ by thousandths. If
            errors differ by much more, S becomes so large that the weight goes to 0
        loss: see above
        clip: half width of the trust region; None does not clip, and needs no old policy unless `rollouts` is "old"
        decay: share of itself that `old` keeps, in [0, 1]; a number or a schedule. By default from 0 to 0.3 in 300 steps
        kl: weight of the squared distance to the reference, >= 0
        levels: noise levels per prompt and update
        sigma_min: least noise level that is drawn from the rollout's grid
        rollouts: policy that samples: "policy", or "old", the old policy. With `decay=Delayed(0.0, 0.3, steps=200)` the old policy is the
            policy itself for 200 steps, and then a short average of it; the release samples from it from then on
        updates: inner updates on the same samples, each with new noise
        rows: (sample, level) pairs per micro-batch of the update; None takes all at once. The gradient does not depend on it

    Raises:
        ValueError: a number is out of range, the reference is trainable, a group has one sample, or the grid has too few noise levels.

    Reference: DGPO, arXiv:2510.08425.
    """

    policy: Policy
    reference: Policy | None = None
    beta: float = attrs.field(default=100.0, validator=finite(attrs.validators.gt(0.0)))
    loss: Literal["weighted", "softplus"] = attrs.field(default="weighted", validator=allowed_word)
    clip: float | None = attrs.field(default=1e-2, validator=attrs.validators.optional(attrs.validators.gt(0.0)))  # type: ignore[arg-type]
    decay: Scalar | float = RECENT
    kl: float = attrs.field(default=0.001, validator=finite(attrs.validators.ge(0.0)))
    levels: int = attrs.field(default=4, validator=attrs.validators.ge(1))
    sigma_min: float = attrs.field(default=0.5, validator=[attrs.validators.ge(0.0), attrs.validators.le(1.0)])
    rollouts: Literal["policy", "old"] = attrs.field(default="policy", validator=allowed_word)
    updates: int = attrs.field(default=1, validator=attrs.validators.ge(1))
    rows: int | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.ge(1)))
    old: Policy | None = attrs.field(default=None, init=False, repr=False)
    _forward: ForwardLosses = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self.reference = given_reference(self.policy, self.reference)
        self.old = None if self.clip is None and self.rollouts == "policy" else self.policy.fork()
        self._forward = ForwardLosses(
            self.policy,
            self.old,
            Follower(self.decay, name="DGPO.decay"),
            GridDraws(self.levels, self.sigma_min, shared=True),
            name="dgpo",
            objective="DGPO",
        )

    def behavior(self) -> Policy:
        return self.policy if self.rollouts == "policy" or self.old is None else self.old

    def losses(self, batch: ScoredBatch, update: int) -> Iterator[Loss]:
        forward = self._forward.draw(batch, update, self.rows)
        assert self.reference is not None
        reference, baseline = forward.under(self.reference, "reference")
        old = None if self.old is None or self.clip is None else forward.under(self.old, "old weights")[1]

        def evaluate(noised: Noised, units: Tensor) -> dict[str, Tensor]:
            velocity = noised.velocity(self.policy)
            return {"error": noised.error(velocity), "distance": mean_square(velocity - reference[units])}

        yield from forward.coupled(evaluate, lambda values: self._loss(forward, values, baseline, old))

    def _loss(self, forward: ForwardBatch, values: Mapping[str, Tensor], baseline: Tensor, old: Tensor | None) -> Loss:
        samples, batch = forward.samples, forward.batch
        sample, group, size = forward.sample, forward.group, forward.size
        advantage = group_normalize(batch.rewards.double(), batch.trajectories.group)[sample]
        samples.require_finite(values["error"], torch.arange(len(sample)), "policy")
        error, clipped = values["error"], torch.zeros_like(sample, dtype=torch.bool)
        if old is not None and self.clip is not None:
            ratio = (old - error.detach()).exp()
            clipped = torch.where(advantage > 0, ratio > 1 + self.clip, ratio < 1 - self.clip)
            error = torch.where(clipped, error.detach(), error)
        # samples of one prompt at one level share noise and are compared with each other
        together = group * samples.levels + torch.arange(len(sample), device=sample.device) % samples.levels
        margin = self.beta * group_sum(advantage * (error - baseline) / size, together)
        per_unit = torch.nn.functional.softplus(margin) if self.loss == "softplus" else margin.detach().sigmoid() * advantage * error
        value = (forward.weight * (per_unit + self.kl * values["distance"])).sum()
        count = torch.tensor(len(sample))
        return Loss(
            value,
            {
                "loss": forward.reported(value, len(sample)),
                "dgpo": (torch.nn.functional.softplus(margin.detach()).sum(), count),
                "weight": (margin.detach().sigmoid().sum(), count),
                "ratio/clipped": (clipped.double().sum(), count),
                "distance/reference": (values["distance"].detach().sum(), count),
            },
        )
