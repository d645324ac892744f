"""Losses as pure functions of small tensors. Legend: K samples; `group` [K] is the prompt group of each."""

from torch import Tensor

from diffalign.core import group_log_softmax, group_mean, group_sum


def tb_residual(log_prob: Tensor, logits: Tensor, group: Tensor) -> Tensor:
    """Trajectory-balance residual r_i = log softmax_group(s)_i - log softmax_group(beta R)_i: [K].

    It is zero in a whole group exactly if s - beta R is constant in that group. Adding a constant to s or to beta R does not change it.

    Args:
        log_prob: [K] s, path log-probabilities (relative to a reference, or not)
        logits: [K] beta R
    """
    return group_log_softmax(log_prob, group) - group_log_softmax(logits, group)


def softmax_tb(log_prob: Tensor, logits: Tensor, group: Tensor) -> Tensor:
    """Softmax Trajectory Balance of each sample's group, sum_i r_i^2, at each sample: [K] (TMPO, arXiv:2605.10983).

    Its gradient is dL/ds_j = 2 (r_j - p_j sum_i r_i), which sums to zero over a group.
    """
    return group_sum(tb_residual(log_prob, logits, group).square(), group)


def group_forward_kl(log_prob: Tensor, logits: Tensor, group: Tensor) -> Tensor:
    """Forward KL(q || p) of each sample's group, p = softmax(s), q = softmax(beta R), at each sample: [K] (Uni-TMPO, arXiv:2609.34688).

    Its gradient is dL/ds_j = p_j - q_j.

    Args:
        log_prob: [K] s, path log-probabilities (relative to a reference, or not)
        logits: [K] beta R
    """
    target = group_log_softmax(logits, group)
    return group_sum(target.exp() * (target - group_log_softmax(log_prob, group)), group)


def reference_constraint(log_prob: Tensor, reference: Tensor, steps: Tensor) -> Tensor:
    """Squared mean log-ratio to a reference per stochastic step, ((s_i - s_i^ref) / m_i)^2: [K] (TMPO, arXiv:2605.10983).

    Args:
        log_prob, reference: [K] path log-probabilities
        steps: [K] stochastic steps m of each path
    """
    return ((log_prob - reference) / steps.clamp(min=1)).square()


def centered(values: Tensor, group: Tensor) -> Tensor:
    """Values minus their group's mean: [K]."""
    return values - group_mean(values, group)


def clipped_surrogate(advantage: Tensor, log_ratio: Tensor, clip: float | None) -> Tensor:
    """Clipped surrogate max(-A rho, -A clip(rho, 1 - clip, 1 + clip)), rho = exp(log_ratio): [K] (PPO, arXiv:1707.06347).

    Args:
        advantage: [K] A, without gradient
        log_ratio: [K] log p_theta - log p_old
        clip: half width of the trust region; None does not clip
    """
    ratio = log_ratio.exp()
    if clip is None:
        return -advantage * ratio
    return (-advantage * ratio).maximum(-advantage * ratio.clamp(1 - clip, 1 + clip))


def effective_share(log_weights: Tensor, group: Tensor) -> Tensor:
    """Effective sample size of a group's softmax as a share of its size, 1 / (K sum_i w_i^2), at each sample: [K] in (0, 1]."""
    squares = group_mean((2 * group_log_softmax(log_weights, group)).exp(), group)
    size = group_sum(log_weights.new_ones(len(log_weights)), group)
    return 1 / (squares * size.square())
