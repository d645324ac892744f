"""Trajectory balance on finished samples: log-ratios by denoising errors in place of those of trajectories."""

import attrs
from torch import Tensor

from diffalign.core import Policy, Scalar

from .elbo import ELBO
from .elbo_matching import ELBOMatching
from .forward import ForwardLosses
from .temperature import Budget, Temperature
from .terms import centered


@attrs.define(eq=False)
class ELBOSoftmaxTB(ELBOMatching):
    """Matches the probabilities of the K finished samples of a prompt to exp(beta R), without their trajectories.

        s_i  = estimate of log p_theta(x_i) - log p_ref(x_i) by denoising errors, in nats (`ELBO`)
        c_i  = (s_i - mean s) - (beta R_i - beta mean R), means over the group
        loss = mean_i c_i c'_i / 2,   c and c' from independent noise

    c_i is the centred residual r_i - mean r of `SoftmaxTB`, so on policy the gradient is that of its centred surrogate, the mean of
    c_i grad s_i. The mean of the loss is half the variance of log p_theta - log p_ref - beta R in the group (VarGrad), for samples of any
    policy, so inner updates need no ratio. The square of one estimate would add the variance of its noise, whose gradient pulls to the
    reference.

    The optimum is p_ref exp(beta R) / Z over all samples of a prompt, with any sampler; that of `SoftmaxTB` is tilted for each root.
    Product of estimates and use for trajectory balance are ours; no paper is known that has them.

    Args:
        policy: the weights being aligned
        reference: frozen; by default a fork of the policy as it is when the objective is built
        beta: inverse temperature, > 0, in nats per unit of aggregated reward; a number, a schedule, or a budget that finds it (`KLBudget`,
            `EffectiveSamples`). In nats only if the bound weighs by likelihood
        bound: estimator of log-ratios. A sample takes 2 x levels network rows of policy and reference, twice that if antithetic
        updates: inner updates on the same samples, each with new noise
        rows: noised rows per micro-batch of the update; None takes all at once. The gradient does not depend on it

    Raises:
        ValueError: beta is not positive and finite, the reference is trainable, or a group has one sample.

    Reference: TMPO, arXiv:2605.10983 (the loss on paths); VarGrad, arXiv:2010.10436; the bound: `ELBO`.
    """

    policy: Policy
    reference: Policy | None = None
    beta: Scalar | Budget | float = 20.0
    bound: ELBO = attrs.field(factory=ELBO)
    updates: int = attrs.field(default=1, validator=attrs.validators.ge(1))
    rows: int | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.ge(1)))
    old: Policy | None = attrs.field(default=None, init=False, repr=False)
    _forward: ForwardLosses = attrs.field(init=False, repr=False)
    _temperature: Temperature = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._temperature = Temperature(self.beta, "ELBOSoftmaxTB")
        self._forward = self._held("elbo_softmax_tb")

    def _mismatch(self, one: Tensor, other: Tensor, logits: Tensor, group: Tensor) -> Tensor:
        return centered(one - logits, group) * centered(other - logits, group) / 2
