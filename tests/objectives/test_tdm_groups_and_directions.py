"""Components of few-step training, each against its formula: group losses, attribution, directions."""

import pytest
import torch
from few_step_numbers import full, normal
from hypothesis import given
from hypothesis import strategies as st

from diffalign import Prompt
from diffalign.core import Progress, Streams
from diffalign.objectives.few_step import (
    AdvantageWeighted,
    Broadcast,
    Discounted,
    ExactSoftplus,
    GroupAdvantage,
    Huber,
    Joint,
    MonteCarlo,
    PerTerm,
    RatioClip,
    ShareMix,
    SigmoidWeighted,
    Squared,
    Unnormalized,
    VectorHuber,
    WeightedMix,
)
from diffalign.objectives.few_step.directions import pull
from diffalign.objectives.few_step.group_objectives import group_score
from diffalign.objectives.few_step.trust_regions import ran_away
from diffalign.policies import GaussianMixturePolicy
from diffalign.samplers import Branching, DeterministicSampler, FixedPlan, TreeSampler, roll_out
from diffalign.testing import TinyPolicy

GROUP = torch.tensor([0, 0, 0, 1, 1, 1, 1])


def group_batch(seed=0):
    advantage = GroupAdvantage("batch", bound=None)(normal(7, seed=seed + 3), GROUP)
    return 0.5 + 0.1 * normal(7, seed=seed), 0.5 + 0.1 * normal(7, seed=seed + 1), advantage


def gradient(objective, error, *rest):
    error = error.clone().requires_grad_()
    (result,) = torch.autograd.grad(objective(error, *rest).sum(), error)
    return result


@given(st.floats(0.1, 50.0))
def test_softplus_has_beta_times_the_gradient_of_the_released_form(beta):
    error, reference, advantage = group_batch()
    sizes = torch.bincount(GROUP)[GROUP]
    exact = gradient(ExactSoftplus(beta), error, reference, advantage, GROUP) / sizes  # one softplus per group
    code = gradient(SigmoidWeighted(beta), error, reference, advantage, GROUP) / sizes
    torch.testing.assert_close(exact, beta * code)


def test_the_weight_is_a_half_where_surrogate_and_reference_agree():
    error, _, advantage = group_batch()
    args = (error, error.clone(), advantage, GROUP)
    torch.testing.assert_close(gradient(SigmoidWeighted(100.0), *args), advantage / 2)
    torch.testing.assert_close(gradient(AdvantageWeighted(), *args), advantage / 2)


@pytest.mark.parametrize("objective", [SigmoidWeighted(10.0), ExactSoftplus(10.0), AdvantageWeighted()], ids=lambda o: type(o).__name__)
def test_signs_permutations_and_equal_rewards(objective):
    error, reference, advantage = group_batch()
    slope = gradient(objective, error, reference, advantage, GROUP)
    assert torch.equal(slope.sign(), advantage.sign())
    order = torch.randperm(7, generator=torch.Generator().manual_seed(2))
    moved = gradient(objective, error[order], reference[order], advantage[order], 1 - GROUP[order])
    torch.testing.assert_close(moved, slope[order])
    none = GroupAdvantage()(torch.full((7,), 0.1), GROUP)
    assert not none.any()
    assert torch.equal(gradient(objective, error, reference, none, GROUP), torch.zeros(7, dtype=torch.float64))


def test_a_constant_of_the_implicit_rewards_cancels_while_advantages_sum_to_zero():
    error, reference, advantage = group_batch()
    before = group_score(error, reference, advantage, GROUP, 3.0)
    torch.testing.assert_close(group_score(error + 0.7, reference, advantage, GROUP, 3.0), before)
    clipped = advantage.clamp(-0.5, 0.5)
    shift = group_score(error + 0.7, reference, clipped, GROUP, 3.0) - group_score(error, reference, clipped, GROUP, 3.0)
    means = torch.stack([clipped[g == GROUP].mean() for g in (0, 1)])[GROUP]
    torch.testing.assert_close(shift, 3.0 * 0.7 * means)
    assert means.abs().max() > 1e-3


@given(st.floats(-3, 3), st.floats(0.5, 4.0), st.sampled_from(["batch", "group", "none"]))
def test_advantages_ignore_shift_and_but_for_epsilon_scale(shift, scale, how):
    rewards = normal(7)
    advantage = GroupAdvantage(how)
    torch.testing.assert_close(advantage(rewards + shift, GROUP), advantage(rewards, GROUP), rtol=1e-8, atol=1e-8)
    if how != "none":
        torch.testing.assert_close(advantage(scale * rewards, GROUP), advantage(rewards, GROUP), rtol=1e-3, atol=1e-3)
    sums = torch.stack([advantage(rewards, GROUP)[g == GROUP].sum() for g in (0, 1)])
    assert sums.abs().max() < 1e-9


def test_advantages_are_in_units_of_the_deviation_of_the_whole_step():
    rewards = normal(7)
    means = torch.stack([rewards[g == GROUP].mean() for g in (0, 1)])[GROUP]
    torch.testing.assert_close(GroupAdvantage()(rewards, GROUP, deviation=2.0), (rewards - means) / (2.0 + 1e-4))
    for how in ("group", "none"):  # have no use for it
        torch.testing.assert_close(GroupAdvantage(how)(rewards, GROUP, deviation=2.0), GroupAdvantage(how)(rewards, GROUP))


def test_advantages_are_bounded():
    rewards = torch.cat([torch.zeros(99), torch.ones(1)])
    assert GroupAdvantage()(rewards, torch.zeros(100, dtype=torch.long)).max() == 5
    assert GroupAdvantage(bound=None)(rewards, torch.zeros(100, dtype=torch.long)).max() > 9


def test_the_trust_region_stops_what_went_far_in_its_direction():
    advantage = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    old = torch.full((6,), 0.5)
    error = old + torch.tensor([-0.01, 0.0, 0.01] * 2)  # a smaller error is a larger ratio
    assert RatioClip(1e-3).outside(error, old, advantage).tolist() == [True, False, False, False, False, True]
    assert not RatioClip(1e-3).outside(old, old, advantage).any()
    far = torch.full((6,), 0.06)
    assert ran_away(error, old, advantage, far, 0.05).tolist() == [True, False, False, False, False, True]
    assert not ran_away(error, old, advantage, far, 0.1).any()


POLICY = TinyPolicy((3,))
PROMPTS = [Prompt("a"), Prompt("b")]


def sampled(sampler):
    with torch.no_grad():
        return sampler.sample(POLICY, POLICY.encode(PROMPTS), Progress(0, 1), Streams(0))


def test_on_deterministic_trajectories_every_attribution_broadcasts():
    forest = sampled(DeterministicSampler(4, samples=3))
    advantage = normal(6)
    expected = advantage[:, None].expand(6, 4)
    assert torch.equal(Broadcast()(forest, advantage), expected)
    torch.testing.assert_close(MonteCarlo()(forest, advantage), expected)
    torch.testing.assert_close(Discounted(0.5)(forest, advantage), expected * torch.tensor([0.125, 0.25, 0.5, 1.0]))


def test_stochastic_trajectories_are_averaged_or_refused():
    with torch.no_grad():
        forest = roll_out(POLICY, POLICY.encode(PROMPTS), Branching((1, 2, 1), (0.0, 0.7, 0.0)), Streams(0), keep_all=True)
    advantage = torch.tensor([1.0, 3.0, -2.0, 0.0], dtype=torch.float64)
    assert MonteCarlo()(forest, advantage)[:, 0].tolist() == [2, 2, -1, -1]
    assert MonteCarlo()(forest, advantage)[:, 1].tolist() == advantage.tolist()
    tree = sampled(TreeSampler(4, FixedPlan((1,), branches=2)))
    with pytest.raises(ValueError, match=r"Broadcast needs deterministic trajectories, .*; 4 edges of this batch are stochastic"):
        Broadcast()(tree, torch.zeros(4))


@pytest.mark.parametrize("distance", [Squared(), Huber(0.1), VectorHuber(0.1)], ids=repr)
def test_a_pull_is_the_stop_gradient_regression(distance):
    clean, direction = normal(3, 2, 2).requires_grad_(), 0.3 * normal(3, 2, 2, seed=1)
    (got,) = torch.autograd.grad(pull(clean, direction, distance).sum(), clean)
    (expected,) = torch.autograd.grad(distance(clean - (clean + direction).detach()).sum(), clean)
    torch.testing.assert_close(got, expected)
    if isinstance(distance, Squared):
        torch.testing.assert_close(got, -2 * direction / 4)
    (none,) = torch.autograd.grad(pull(clean, torch.zeros_like(direction), distance).sum(), clean)
    assert not none.any()


def test_a_small_direction_is_not_lost_below_the_last_digit():
    clean, direction = torch.full((1, 2), 1000.0, requires_grad=True), torch.full((1, 2), 1e-6)
    (got,) = torch.autograd.grad(pull(clean, direction, Squared()).sum(), clean)
    torch.testing.assert_close(got, -direction)


def test_normalizers():
    clean = torch.zeros(2, 3)
    aims = {"kl": torch.tensor([[1.0, 2.0, -3.0], [0.0, 0.0, 0.0]]), "reward": torch.full((2, 3), 0.5)}
    assert PerTerm()(clean, aims)["kl"].tolist() == pytest.approx([2.0, 1e-4])
    assert Joint()(clean, aims)["reward"].tolist() == pytest.approx([2.0, 0.5])
    assert Unnormalized()(clean, aims)["kl"].tolist() == [1, 1]


def test_mixes():
    assert ShareMix(0.3).weights(True) == {"kl": 1.0, "guidance": 0.3, "reward": 0.7}
    assert ShareMix(0.3).weights(False) == {"kl": 0.3, "guidance": 0.3, "reward": 0.0}
    assert ShareMix(1.0).weights(True)["reward"] == 0
    assert ShareMix(0.0).weights(True)["guidance"] == 0
    assert WeightedMix(2.0, 0.5, 1.5).weights(False) == {"kl": 1.5, "guidance": 0.5, "reward": 0.0}


@given(st.floats(0.1, 0.95), st.floats(-2, 2), st.floats(-2, 2), st.floats(0.3, 1.5))
def test_between_gaussians_of_equal_variance_directions_are_constant(tau, first, second, scale):
    """f_a - f_b = (mu_a - mu_b) tau^2 / V at every x."""
    policies = [GaussianMixturePolicy(torch.tensor([[mean]], dtype=torch.float64), scale) for mean in (first, second)]
    x, condition = normal(5, 1), policies[0].encode([Prompt("a")] * 5)
    a, b = (policy.predict_clean(x, full(tau, 5), condition).detach() for policy in policies)
    variance = (1 - tau) ** 2 * scale**2 + tau**2
    torch.testing.assert_close(a - b, torch.full_like(a, (first - second) * tau**2 / variance), rtol=1e-8, atol=1e-8)
