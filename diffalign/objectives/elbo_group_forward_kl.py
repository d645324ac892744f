"""Forward KL on finished samples: log-ratios by denoising errors in place of those of trajectories."""

import attrs
import torch
from torch import Tensor

from diffalign.core import Policy, Scalar, group_log_softmax

from .elbo import ELBO
from .elbo_matching import ELBOMatching
from .forward import ForwardLosses
from .temperature import Budget, Temperature


@attrs.define(eq=False)
class ELBOGroupForwardKL(ELBOMatching):
    """Moves the softmax over the K finished samples of a prompt to the Boltzmann distribution of their rewards, in forward KL.

        s_i = estimate of log p_theta(x_i) - log p_ref(x_i) by denoising errors, in nats (`ELBO`)
        p = softmax(s),   q = softmax(beta R),   loss = KL(q || p),   dL/ds_i = p_i - q_i

    As in `GroupForwardKL`, but s has noise. Each of two independent estimates of s gets the gradient p_i - q_i with the p of the other,
    which does not correlate with its noise. The mean of p_i itself is that of a softmax of noisy numbers: it is sharper than p by about
    half the variance of s, which the metric `log_ratio/noise` shows.

    Args:
        policy: the weights being aligned
        reference: frozen; by default a fork of the policy as it is when the objective is built
        beta: inverse temperature, > 0, in nats per unit of aggregated reward; a number, a schedule, or a budget that finds it (`KLBudget`,
            `EffectiveSamples`). In nats only if the bound weighs by likelihood
        bound: estimator of log-ratios. A sample takes 2 x levels network rows of policy and reference, twice that if antithetic
        rows: noised rows per micro-batch of the update; None takes all at once. The gradient does not depend on it

    Raises:
        ValueError: beta is not positive and finite, the reference is trainable, or a group has one sample.

    Reference: Uni-TMPO, arXiv:2609.34688 (the loss on paths); the bound: `ELBO`.
    """

    policy: Policy
    reference: Policy | None = None
    beta: Scalar | Budget | float = 20.0
    bound: ELBO = attrs.field(factory=ELBO)
    rows: int | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.ge(1)))
    updates: int = attrs.field(default=1, init=False, repr=False)  # an on-policy estimate: each batch is used once
    old: Policy | None = attrs.field(default=None, init=False, repr=False)
    _forward: ForwardLosses = attrs.field(init=False, repr=False)
    _temperature: Temperature = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._temperature = Temperature(self.beta, "ELBOGroupForwardKL")
        self._forward = self._held("elbo_group_forward_kl")

    def _mismatch(self, one: Tensor, other: Tensor, logits: Tensor, group: Tensor) -> Tensor:
        log_target = group_log_softmax(logits, group)
        target = log_target.exp()
        size = torch.bincount(group)[group]  # the caller takes a mean over the samples
        halves = [(group_log_softmax(fixed.detach(), group).exp() - target) * moving for moving, fixed in ((one, other), (other, one))]
        pull = (halves[0] + halves[1]) / 2
        known = target * (log_target - group_log_softmax((one + other).detach() / 2, group))
        return size * (known + pull - pull.detach())
