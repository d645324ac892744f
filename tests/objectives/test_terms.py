"""The losses as pure functions: the invariants of Softmax-TB, the clipped surrogate, and the release's numbers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffalign.core import group_log_softmax, group_sum
from diffalign.objectives.terms import centered, clipped_surrogate, effective_share, softmax_tb, tb_residual
from diffalign.testing.strategies import reward_groups

BETAS = st.floats(0.1, 20)


@st.composite
def paths_and_rewards(draw):
    """Path log-probs [K], rewards [K] in [-2, 2] and groups [K]."""
    values, group = draw(reward_groups(bound=10))
    number = st.floats(-2, 2, width=32)
    return values, torch.tensor(draw(st.lists(number, min_size=len(values), max_size=len(values))), dtype=torch.float64), group


def one_group(values):
    return torch.zeros(len(values), dtype=torch.long)


@given(paths_and_rewards(), BETAS)
def test_terms_equal_a_loop_over_groups(case, beta):
    paths, rewards, group = case
    for index in group.unique():
        mine = group == index
        residual = paths[mine].log_softmax(0) - (beta * rewards[mine]).log_softmax(0)
        torch.testing.assert_close(tb_residual(paths, beta * rewards, group)[mine], residual, rtol=1e-9, atol=1e-9)
        expected = residual.square().sum().expand_as(residual)
        torch.testing.assert_close(softmax_tb(paths, beta * rewards, group)[mine], expected, rtol=1e-9, atol=1e-9)


@given(paths_and_rewards(), BETAS, st.floats(-50, 50), st.floats(-50, 50))
def test_shifts_of_paths_and_rewards_within_a_group_change_nothing(case, beta, a, b):
    paths, rewards, group = case
    moved = tb_residual(paths + a * (1 + group), beta * (rewards + b * (1 + group)), group)
    torch.testing.assert_close(moved, tb_residual(paths, beta * rewards, group), rtol=1e-9, atol=1e-9)


@given(paths_and_rewards(), st.integers(0, 100))
def test_residuals_follow_a_permutation_of_the_samples(case, seed):
    paths, rewards, group = case
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed))
    moved = tb_residual(paths[order], rewards[order], group[order])
    torch.testing.assert_close(moved, tb_residual(paths, rewards, group)[order], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(softmax_tb(paths[order], rewards[order], group[order]), softmax_tb(paths, rewards, group)[order])


@given(paths_and_rewards(), BETAS)
def test_the_loss_is_zero_exactly_where_the_paths_are_the_tilted_rewards(case, beta):
    _, rewards, group = case
    matched = beta * rewards + 3.0 * group
    assert softmax_tb(matched, beta * rewards, group).max() < 1e-20
    bumped = matched.clone()
    bumped[0] += 0.5
    loss = softmax_tb(bumped, beta * rewards, group)
    several = (group == group[0]).sum() > 1
    assert (loss[0] > 1e-4) == several
    assert (loss[group != group[0]] < 1e-20).all()


@given(paths_and_rewards())
def test_the_gradient_is_the_closed_form_and_sums_to_zero(case):
    paths, rewards, group = case
    leaf = paths.clone().requires_grad_()
    loss = softmax_tb(leaf, rewards, group)
    first = torch.tensor([int((group == index).nonzero()[0]) for index in group.unique()])
    (gradient,) = torch.autograd.grad(loss[first].sum(), leaf)  # each group once
    residual, share = tb_residual(paths, rewards, group), group_log_softmax(paths, group).exp()
    expected = 2 * (residual - share * group_sum(residual, group))
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)
    assert group_sum(gradient, group).abs().max() < 1e-9


GROUP = torch.tensor([1, 0, 1, 2, 1])
PATHS = torch.tensor([0.3, -1.0, 2.0, 0.5, 1.5], dtype=torch.float64)
LOGITS = torch.tensor([1.0, 0.5, -0.5, 0.0, 2.0], dtype=torch.float64)


@pytest.mark.parametrize(
    "term",
    [
        lambda x, y: softmax_tb(x, y, GROUP),
        lambda x, y: tb_residual(x, y, GROUP),
        lambda x, y: centered(x, GROUP) * y,
        lambda x, y: effective_share(x, GROUP) * y,
        lambda x, y: clipped_surrogate(LOGITS, 0.05 * x, 0.2) * y,
        lambda x, y: clipped_surrogate(LOGITS, x, None) * y,
    ],
)
def test_gradients_of_terms_are_exact(term):
    assert torch.autograd.gradcheck(term, (PATHS.clone().requires_grad_(), LOGITS.clone().requires_grad_()))


def test_softmax_tb_in_numbers():
    # s = (0, ln 3): p = (1/4, 3/4); beta R = (ln 3, 0): q = (3/4, 1/4); r = (-ln 3, ln 3)
    paths, logits = torch.tensor([0.0, math.log(3)]), torch.tensor([math.log(3), 0.0])
    torch.testing.assert_close(tb_residual(paths, logits, one_group(paths)), torch.tensor([-math.log(3), math.log(3)]))
    torch.testing.assert_close(softmax_tb(paths, logits, one_group(paths)), torch.full((2,), 2 * math.log(3) ** 2))


@given(st.floats(-1000, 1000), st.floats(-1000, 1000))
def test_a_group_of_one_has_neither_loss_nor_gradient(path, logit):
    leaf = torch.tensor([path], dtype=torch.float64, requires_grad=True)
    loss = softmax_tb(leaf, torch.tensor([logit], dtype=torch.float64), one_group(leaf))
    loss.sum().backward()
    assert loss.item() == 0
    assert leaf.grad.item() == 0


@given(paths_and_rewards())
def test_at_infinite_temperature_the_target_is_uniform(case):
    paths, rewards, group = case
    size = group_sum(torch.ones_like(paths), group)
    expected = group_log_softmax(paths, group) + size.log()
    torch.testing.assert_close(tb_residual(paths, 0.0 * rewards, group), expected, rtol=1e-9, atol=1e-9)


@given(paths_and_rewards())
def test_extremes_stay_finite_and_bounded_by_the_ranges(case):
    paths, rewards, group = case
    paths, logits = 100 * paths, 1000 * rewards
    residual = tb_residual(paths, logits, group)
    assert residual.isfinite().all()
    for index in group.unique():
        mine = group == index
        ranges = paths[mine].max() - paths[mine].min() + logits[mine].max() - logits[mine].min()
        assert residual[mine].abs().max() <= ranges + 1e-6


@given(paths_and_rewards(), BETAS)
def test_means_of_the_residual_are_divergences(case, beta):
    paths, rewards, group = case
    log_p, log_q = group_log_softmax(paths, group), group_log_softmax(beta * rewards, group)
    advantage = -tb_residual(paths, beta * rewards, group)
    forward, reverse = group_sum(log_q.exp() * advantage, group), -group_sum(log_p.exp() * advantage, group)
    assert forward.min() > -1e-12  # KL(q || p)
    assert reverse.min() > -1e-12  # KL(p || q)
    size = group_sum(torch.ones_like(paths), group)
    uniform = -size.log()
    to_p, to_q = (group_sum((uniform - logs) / size, group) for logs in (log_p, log_q))
    torch.testing.assert_close(group_sum(advantage, group) / size, to_p - to_q, rtol=1e-9, atol=1e-9)
    root = softmax_tb(paths, beta * rewards, group).sqrt()  # the loss bounds both divergences (Cauchy-Schwarz)
    assert (forward <= group_sum((2 * log_q).exp(), group).sqrt() * root + 1e-9).all()
    assert (reverse <= group_sum((2 * log_p).exp(), group).sqrt() * root + 1e-9).all()


@given(paths_and_rewards(), BETAS)
def test_with_equal_paths_the_gradient_is_the_centred_advantage(case, beta):
    _, rewards, group = case
    leaf = torch.zeros_like(rewards).requires_grad_()
    loss = softmax_tb(leaf, beta * rewards, group) / group_sum(torch.ones_like(rewards), group)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    advantage = -tb_residual(leaf.detach(), beta * rewards, group)
    torch.testing.assert_close(gradient, -2 * centered(advantage, group), rtol=1e-9, atol=1e-9)


@given(paths_and_rewards())
def test_centred_values_have_no_group_mean(case):
    values, _, group = case
    assert group_sum(centered(values, group), group).abs().max() < 1e-9


@given(st.floats(0.1, 0.5), st.floats(-1.5, 1.5), st.floats(-3, 3))
def test_the_surrogate_takes_the_worse_of_the_ratio_and_the_clipped_ratio(clip, log_ratio, advantage):
    leaf = torch.tensor([log_ratio], dtype=torch.float64, requires_grad=True)
    value = clipped_surrogate(torch.tensor([advantage], dtype=torch.float64), leaf, clip)
    ratio = math.exp(log_ratio)
    assert value.item() == pytest.approx(max(-advantage * ratio, -advantage * min(max(ratio, 1 - clip), 1 + clip)))
    value.sum().backward()
    outside = (advantage > 0 and ratio > 1 + clip) or (advantage < 0 and ratio < 1 - clip)
    assert leaf.grad.item() == pytest.approx(0.0 if outside else -advantage * ratio)


def test_without_clip_the_surrogate_is_linear_in_the_ratio():
    value = clipped_surrogate(torch.tensor([2.0, -1.0]), torch.tensor([3.0, -3.0]), None)
    torch.testing.assert_close(value, torch.tensor([-2 * math.exp(3), math.exp(-3)]))


def test_effective_share_lies_between_one_sample_and_all():
    logits = torch.tensor([0.0, 0.0, 0.0, 0.0, 100.0, 0.0, 0.0, math.log(3.0)], dtype=torch.float64)
    group = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    # weights: uniform of 3; one of 3; (1/4, 3/4) with 1 / (2 (1/16 + 9/16)) = 0.8
    expected = torch.tensor([1, 1, 1, 1 / 3, 1 / 3, 1 / 3, 0.8, 0.8], dtype=torch.float64)
    torch.testing.assert_close(effective_share(logits, group), expected)


def test_softmax_tb_agrees_with_the_release(golden):
    for row in golden["softmax_tb"]:
        paths = torch.tensor(row["path_log_probs"]).requires_grad_()
        logits = row["beta"] * torch.tensor(row["rewards"])
        group = one_group(paths)
        residual, loss = tb_residual(paths, logits, group), softmax_tb(paths, logits, group)[0]
        (gradient,) = torch.autograd.grad(loss, paths)
        # a residual is a difference of two log-probabilities, so its float32 error is theirs
        logs = torch.cat([group_log_softmax(values, group) for values in (paths.detach(), logits)])
        unit = 1e-6 * max(1.0, float(logs.abs().max()))
        torch.testing.assert_close(-residual.detach(), torch.tensor(row["advantage"]), rtol=1e-6, atol=unit)
        torch.testing.assert_close(residual.detach().square(), torch.tensor(row["per_path"]), rtol=1e-6, atol=unit)
        torch.testing.assert_close(loss.detach(), torch.tensor(row["forward"]), rtol=1e-6, atol=unit)
        torch.testing.assert_close(gradient, torch.tensor(row["grad_forward"]), rtol=1e-6, atol=2 * unit)


def test_the_surrogate_on_policy_agrees_with_the_release(golden):
    row = golden["tmpo_loss"][0]  # the one that is on policy
    paths = torch.tensor(row["current_log_probs"]).requires_grad_()
    advantage = -tb_residual(paths, row["beta"] * torch.tensor(row["rewards"]), one_group(paths)).detach()
    loss = clipped_surrogate(advantage, paths - torch.tensor(row["old_log_probs"]), row["clip_range"]).mean()
    loss.backward()
    assert loss.item() == pytest.approx(row["loss"], rel=1e-6)
    torch.testing.assert_close(paths.grad, torch.tensor(row["grad_current_log_probs"]), rtol=1e-6, atol=1e-7)


@given(paths_and_rewards())
def test_a_log_z_that_leaves_the_sample_out_is_the_groups_mean_at_another_length(case):
    values, _, group = case
    for index in (index for index in group.unique() if int((group == index).sum()) > 1):
        mine = values[group == index]
        count = len(mine)
        apart = torch.stack([mine[place] - torch.cat([mine[:place], mine[place + 1 :]]).mean() for place in range(count)])
        torch.testing.assert_close(apart, centered(values, group)[group == index] * count / (count - 1), rtol=1e-9, atol=1e-9)
