"""Policy gradient on finished samples, whose likelihoods are those of the evidence lower bound."""

from collections.abc import Iterator, Mapping

import attrs
import torch
from torch import Tensor

from diffalign.core import Follower, Loss, Policy, ScoredBatch, group_sum
from diffalign.core.number_fields import finite

from .elbo import ELBO, Estimates
from .forward import ForwardBatch, ForwardLosses, ForwardObjective
from .noised import Noised
from .requirements import given_reference
from .terms import centered, clipped_surrogate


@attrs.define(eq=False)
class ELBOPolicyGradient(ForwardObjective):
    """Policy gradient whose log-likelihood of a finished sample is its evidence lower bound.

        l_i  = -sum of weighted denoising errors of x_i (`ELBO`),   rho_i = exp((l_i - l_i^old) / D)
        A_i  = (R_i - mean R) - kl (s_i - mean s),   s_i = l_i - l_i^ref, without gradient
        loss = D mean_i max(-A_i rho_i, -A_i clip(rho_i, 1 - clip, 1 + clip))

    Rewards are centred, not divided by their deviation, and no trajectory is needed: the three choices that the paper found to matter. Its
    loss -sg[rho] A l has the gradient of -A rho, and its KL penalty kl E[s] has on policy the expected gradient of the term in A_i. So the
    optimum is p_ref exp(R / kl) / Z.

    What is ours: l is per latent dimension in rho, or one update would move every ratio out of [1 - clip, 1 + clip], and the factor D
    restores the gradient; s comes from other noise than the ratio that it multiplies, so that no variance enters the gradient. The paper
    has a proximal variant whose formula could not be confirmed. The clipped ratio here is that of PPO (arXiv:1707.06347).

    Args:
        policy: the weights being aligned
        reference: frozen; by default a fork of the policy as it is when the objective is built
        kl: weight of the log-ratio to the reference, > 0: units of reward per nat. 1 / kl corresponds to beta of `ELBOSoftmaxTB`
        bound: estimator of log-likelihoods. A sample takes 2 x levels network rows of each policy, twice that if antithetic
        clip: half width of the trust region of rho; None does not clip. It matters from the second update on
        updates: inner updates on the same samples, each with new noise. With 1 the old policy is the policy, and costs nothing
        rows: noised rows per micro-batch of the update; None takes all at once. The gradient does not depend on it

    Raises:
        ValueError: a number is out of range, the reference is trainable, or a group has one sample.

    Reference: arXiv:2602.04663.
    """

    policy: Policy
    reference: Policy | None = None
    kl: float = attrs.field(default=0.05, validator=finite(attrs.validators.gt(0.0)))
    bound: ELBO = attrs.field(factory=ELBO)
    clip: float | None = attrs.field(default=1e-3, validator=attrs.validators.optional(attrs.validators.gt(0.0)))  # type: ignore[arg-type]
    updates: int = attrs.field(default=1, validator=attrs.validators.ge(1))
    rows: int | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.ge(1)))
    old: Policy | None = attrs.field(default=None, init=False, repr=False)
    _forward: ForwardLosses = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self.reference = given_reference(self.policy, self.reference)
        self.old = self.policy.fork() if self.updates > 1 else None
        draws = Estimates(self.bound)
        self._forward = ForwardLosses(self.policy, self.old, Follower(0.0), draws, "elbo_policy_gradient", "ELBOPolicyGradient")

    def losses(self, batch: ScoredBatch, update: int) -> Iterator[Loss]:
        assert self.reference is not None
        forward = self._forward.draw(batch, update, self.rows)
        reference = forward.errors(self.reference, "reference")
        old = None if self.old is None else forward.errors(self.old, "old weights")

        def evaluate(noised: Noised, units: Tensor) -> dict[str, Tensor]:
            return {"error": noised.error(noised.velocity(self.policy))}

        yield from forward.coupled(evaluate, lambda values: self._loss(forward, values["error"], reference, old))

    def _loss(self, forward: ForwardBatch, error: Tensor, reference: Tensor, old: Tensor | None) -> Loss:
        batch, group = forward.batch, forward.batch.trajectories.group
        forward.samples.require_finite(error, torch.arange(len(forward)), "policy")
        size = batch.trajectories.latents[0].numel()
        drift = self.bound.log_ratio(forward, reference, error).detach()
        ratios = self.bound.log_ratio(forward, error.detach() if old is None else old, error) / size
        rewards = batch.rewards.double()
        pairs = zip(ratios, drift.flip(0), strict=True)  # the advantage of each ratio has the noise of the other
        surrogates = [clipped_surrogate(centered(rewards - self.kl * apart, group), ratio, self.clip) for ratio, apart in pairs]
        per_sample = size * torch.stack(surrogates).mean(dim=0) / group_sum(torch.ones_like(rewards), group)
        value, count = per_sample.sum() / batch.groups, torch.tensor(ratios.numel())
        outside = (ratios.detach().exp() - 1).abs() > (self.clip or float("inf"))
        metrics: Mapping[str, tuple[Tensor, Tensor]] = {
            "loss": forward.reported(value, len(forward)),
            "log_ratio/reference": (drift.sum(), count),
            "ratio/clipped": (outside.double().sum(), count),
        }
        return Loss(value, metrics)
