"""Group forward KL: its gradient, its zero, and what it leaves out."""

import attrs
import pytest
import torch
from hypothesis import given
from tiny import assert_same, batch_of, gradient, pair

from diffalign.core import CPS, Edges, group_log_softmax, replay_log_prob
from diffalign.objectives import GroupForwardKL
from diffalign.objectives.terms import group_forward_kl
from diffalign.testing.slow import path_log_prob
from diffalign.testing.strategies import reward_groups


@given(reward_groups())
def test_its_gradient_is_p_minus_q_and_bounded(drawn):
    rewards, group = drawn
    generator = torch.Generator().manual_seed(len(rewards))
    log_prob = torch.randn(len(rewards), generator=generator, dtype=torch.float64).requires_grad_()
    logits = rewards.double()
    divergence = group_forward_kl(log_prob, logits, group)
    assert bool((divergence.detach() >= -1e-12).all())
    sizes = torch.bincount(group)[group]
    (gradient,) = torch.autograd.grad((divergence / sizes).sum(), log_prob)
    expected = group_log_softmax(log_prob.detach(), group).exp() - group_log_softmax(logits, group).exp()
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
    for index in group.unique():
        assert abs(float(gradient[group == index].sum())) < 1e-9
        assert float(gradient[group == index].abs().sum()) <= 2 + 1e-9


def test_it_is_zero_exactly_where_the_policy_has_the_rewards_distribution():
    logits, group = torch.tensor([1.0, -2.0, 0.5, 4.0], dtype=torch.float64), torch.tensor([0, 0, 0, 1])
    torch.testing.assert_close(group_forward_kl(logits + 3.0, logits, group), torch.zeros(4, dtype=torch.float64))
    assert float(group_forward_kl(logits * 2, logits, group)[0]) > 0.01


@pytest.mark.parametrize("kernel", [CPS("mean"), CPS("sum")], ids=repr)
def test_on_policy_at_the_reference_it_is_the_reward_term_alone(kernel):
    """With s = 0 the gradient is sum_i (1/K - q_i) grad s_i."""
    policy, _ = pair(kernel)
    batch = batch_of(policy)
    objective = GroupForwardKL(policy, beta=3.0)
    got = gradient(objective, batch)
    forest = batch.trajectories
    q = group_log_softmax(3.0 * batch.rewards.double(), forest.group).exp()
    edges = Edges.of(forest)
    log_prob = replay_log_prob(policy, forest, edges)
    path = forest.path_sum(log_prob.new_zeros(len(forest.latents)).index_copy(0, edges.child, log_prob))
    value = ((1 / 9 - q) * path).sum() / 2 * (4 if kernel.density == "mean" else 1)  # nats, of 4 dimensions
    parameters = list(policy.trainable_parameters().values())
    assert_same(got, torch.cat([part.flatten() for part in torch.autograd.grad(value, parameters)]))


def test_groups_without_spread_are_skipped_under_path_and_counted():
    policy, _ = pair()
    batch = batch_of(policy)
    flat = attrs.evolve(batch, rewards=torch.where(batch.trajectories.group == 0, 0.5, batch.rewards))
    only = attrs.evolve(batch, rewards=torch.full_like(batch.rewards, 0.5))
    objective = GroupForwardKL(policy, measure="path")
    assert float(gradient(objective, only).norm()) == 0.0
    (phase,) = objective.phases()
    (loss,) = phase.losses(flat, 0)
    total, count = loss.metrics["skipped_groups"]
    assert float(total / count) == 0.5
    assert float(gradient(GroupForwardKL(policy, measure="path", spread=1e9), batch).norm()) == 0.0


def test_under_relative_a_group_without_spread_pulls_back_to_the_reference():
    """With q = 1/K the gradient is sum_i (p_i - 1/K) grad s_i."""
    policy, reference = pair()
    batch = batch_of(policy)
    batch = attrs.evolve(batch, rewards=torch.full_like(batch.rewards, 0.5))
    forest = batch.trajectories
    path = path_log_prob(policy, forest, nats=True)
    p = group_log_softmax((path - path_log_prob(reference, forest, nats=True)).detach(), forest.group).exp()
    parameters = list(policy.trainable_parameters().values())
    expected = torch.autograd.grad(((p - 1 / 9) * path).sum() / 2, parameters)
    assert_same(gradient(GroupForwardKL(policy, reference), batch), torch.cat([part.flatten() for part in expected]))
