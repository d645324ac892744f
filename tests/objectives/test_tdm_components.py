"""The components of few-step training, each against its formula."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffalign import Prompt
from diffalign.core import Progress, Streams
from diffalign.objectives.few_step import (
    AdvantageWeighted,
    Broadcast,
    CleanerStages,
    CleanTarget,
    Discounted,
    EveryStage,
    ExactSoftplus,
    ExactTarget,
    FinalStage,
    FixedTime,
    GroupAdvantage,
    Huber,
    Joint,
    LogitNormalTime,
    MonteCarlo,
    Overlap,
    PerTerm,
    RatioClip,
    Separate,
    ShareMix,
    ShiftedTime,
    SigmoidWeighted,
    Squared,
    UniformStages,
    Unnormalized,
    VectorHuber,
    WeightedCleanTarget,
    WeightedMix,
)
from diffalign.objectives.few_step.directions import pull
from diffalign.objectives.few_step.fake_targets import NoisedEnds
from diffalign.objectives.few_step.group_objectives import group_score
from diffalign.objectives.few_step.noising import bridge_velocity, diffuse, kernel
from diffalign.objectives.few_step.query_times import shift_time, unshift_time
from diffalign.objectives.few_step.trust_regions import ran_away
from diffalign.policies import GaussianMixturePolicy
from diffalign.samplers import Branching, DeterministicSampler, FixedPlan, TreeSampler, roll_out
from diffalign.testing import TinyPolicy

LEVELS = st.floats(0.0, 0.98)


def full(value, count=1):
    return torch.full((count,), float(value), dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- noising ---------------------------------------------------------------------------------------------------------------------


@given(LEVELS, LEVELS, LEVELS)
def test_kernels_compose(first, second, third):
    s, t, u = sorted((first, second, third))
    (a1, b1), (a2, b2), (a, b) = kernel(full(s), full(t)), kernel(full(t), full(u)), kernel(full(s), full(u))
    torch.testing.assert_close(a1 * a2, a, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close((a2 * b1).square() + b2.square(), b.square(), rtol=1e-8, atol=1e-12)


@given(LEVELS)
def test_kernels_at_their_ends(level):
    assert [value.item() for value in kernel(full(level), full(level))] == pytest.approx([1, 0], abs=1e-7)
    assert [value.item() for value in kernel(full(0), full(level))] == pytest.approx([1 - level, level])
    assert [value.item() for value in kernel(full(level), full(1))] == [0, 1]


def test_noise_is_not_taken_away():
    with pytest.raises(ValueError, match="noise can be added only upwards"):
        kernel(full(0.5), full(0.4))
    with pytest.raises(ValueError, match="needs tau above s"):
        bridge_velocity(normal(1, 2), full(0.5), full(0.5), normal(1, 2))


@given(st.floats(0.0, 0.9), st.floats(0.02, 0.98))
def test_the_bridge_velocity_is_the_derivative_of_the_noised_state(s, part):
    tau = s + part * (1 - s)
    x, e, h = normal(3, 2), normal(3, 2, seed=1), 1e-6
    difference = (diffuse(x, full(s, 3), full(tau + h, 3), e) - diffuse(x, full(s, 3), full(tau - h, 3), e)) / (2 * h)
    torch.testing.assert_close(bridge_velocity(x, full(s, 3), full(tau, 3), e), difference, rtol=1e-4, atol=1e-4)


def test_the_bridge_velocity_of_clean_data_is_noise_minus_data():
    x, e = normal(3, 2), normal(3, 2, seed=1)
    torch.testing.assert_close(bridge_velocity(x, full(0, 3), full(0.7, 3), e), e - x)


@pytest.mark.parametrize("s", [0.0, 0.4])
def test_regression_on_the_bridge_velocity_gives_the_exact_score_of_any_law(s):
    """E[v* | x_tau] = -x_tau / (1 - tau) - tau / (1 - tau) score for states that are two peaks, nothing like noised data."""
    tau, count = 0.7, 400_000
    peaks = torch.tensor([-0.8, 1.3], dtype=torch.float64)
    x = peaks[torch.arange(count) % 2][:, None]
    e = normal(count, 1)
    noised = diffuse(x, full(s, count), full(tau, count), e)
    target = bridge_velocity(x, full(s, count), full(tau, count), e)
    a, b = (value.item() for value in kernel(full(s), full(tau)))
    weights = (-(noised - a * peaks).square() / (2 * b**2)).softmax(dim=1)
    score = ((a * peaks - noised) / b**2 * weights).sum(dim=1, keepdim=True)
    expected = -noised / (1 - tau) - tau / (1 - tau) * score
    residual = target - expected
    features = torch.cat([torch.ones_like(noised), noised, noised.square(), torch.tanh(3 * noised)], dim=1)
    moments = features.T @ residual / count
    tolerance = 5 * residual.std() * features.square().mean(dim=0).sqrt() / math.sqrt(count)
    assert (moments.abs().squeeze(1) < tolerance).all()


# --- fake targets ----------------------------------------------------------------------------------------------------------------


def linear_student(count=400_000, s=0.8996, s_end=0.7496, tau=0.85, gain=0.3, spread=0.95):
    """Ends of a stage whose clean prediction is gain * x, for x ~ N(0, spread^2): everything is Gaussian."""
    x, e = spread * normal(count, 1), normal(count, 1, seed=1)
    clean = gain * x
    end = (1 - s_end) * clean + s_end * (x - (1 - s) * clean) / s
    ends = NoisedEnds(end, clean, full(s_end, count), full(tau, count), e, diffuse(end, full(s_end, count), full(tau, count), e))
    a, b = (value.item() for value in kernel(full(s_end), full(tau)))
    share = (1 - s_end) * gain + s_end * (1 - (1 - s) * gain) / s
    return ends, a**2 * share**2 * spread**2 + b**2, (1 - tau) ** 2 * gain**2 * spread**2 + tau**2


def slope(ends, target):
    """The minimiser over linear velocities, and its standard error."""
    velocity, weight = target(ends)
    x, y, w = ends.noised.squeeze(1), velocity.squeeze(1), weight
    value = (w * x * y).sum() / (w * x * x).sum()
    return value.item(), ((w * x * (y - value * x)).square().sum().sqrt() / (w * x * x).sum()).item()


def velocity_slope(variance, tau):
    return -(1 - tau / variance) / (1 - tau)


def test_what_each_fake_target_estimates():
    ends, marginal, diffused = linear_student()
    exact, error = slope(ends, ExactTarget())
    assert exact == pytest.approx(velocity_slope(marginal, 0.85), abs=4 * error)
    weighted, error = slope(ends, WeightedCleanTarget(tempered=False))  # the likelihood ratio of one dimension
    assert weighted == pytest.approx(velocity_slope(diffused, 0.85), abs=4 * error)
    plain, error = slope(ends, CleanTarget())
    assert abs(plain - velocity_slope(marginal, 0.85)) > 10 * error
    assert abs(plain - velocity_slope(diffused, 0.85)) > 10 * error


def test_at_the_last_stage_all_targets_are_one():
    count = 50
    clean, e = normal(count, 2), normal(count, 2, seed=1)
    ends = NoisedEnds(clean, clean, full(0, count), full(0.6, count), e, diffuse(clean, full(0, count), full(0.6, count), e))
    exact, ones = ExactTarget()(ends)
    plain, _ = CleanTarget()(ends)
    weighted, weight = WeightedCleanTarget(cap=100.0)(ends)
    torch.testing.assert_close(plain, exact)
    torch.testing.assert_close(weighted, exact)
    torch.testing.assert_close(weight, (0.4 / 0.6) ** 2 * 0.6**2 * ones)  # the importance weight is 1
    torch.testing.assert_close(WeightedCleanTarget(cap=0.1)(ends)[1], 0.1 * 0.6**2 * ones)


# --- query times, intervals, stages ----------------------------------------------------------------------------------------------


@given(st.floats(0.0, 1.0), st.floats(1.0, 8.0))
def test_the_shift_map_has_its_inverse(u, shift):
    assert unshift_time(shift_time(full(u), shift), shift).item() == pytest.approx(u, abs=1e-9)


@given(
    st.floats(0.0, 0.9), st.floats(0.0, 0.9), st.floats(0.0, 0.999), st.sampled_from([ShiftedTime(), ShiftedTime(1.0), LogitNormalTime()])
)
def test_query_times_keep_margin_floor_and_one(end, floor, uniform, times):
    low = full(max(end, floor))
    tau = times(low, full(1.0), full(uniform)).item()
    assert max(end, floor) < tau <= 1
    if isinstance(times, ShiftedTime):
        assert unshift_time(full(tau), times.shift) >= unshift_time(low, times.shift) + times.margin - 1e-9


def test_the_released_query_times():
    ends = torch.tensor([0.899, 0.749, 0.499, 0.0, 0.25, 0.3, 0.4, 0.55], dtype=torch.float64)
    least = ShiftedTime()(ends, torch.ones_like(ends), torch.zeros_like(ends))
    assert (1000 * least).tolist() == pytest.approx([908.5, 763.7, 525.0, 57.7, 290, 337, 431, 574], abs=0.6)


def test_query_times_without_room_are_refused():
    with pytest.raises(ValueError, match=r"query times must lie between .* where there is nothing. Lower the floor or the margin"):
        ShiftedTime()(full(0.9), full(0.75), full(0.5))
    with pytest.raises(ValueError, match=r"FixedTime.tau must lie in the stage's interval"):
        FixedTime(0.5)(full(0.6), full(1.0), full(0.5))
    assert FixedTime(0.5)(full(0.2), full(1.0), full(0.9)).item() == 0.5


def test_intervals():
    sigma = torch.tensor([1.0, 0.9, 0.5])
    assert Overlap().top(sigma).tolist() == [1, 1, 1]
    assert torch.equal(Separate().top(sigma), sigma)


def test_stage_samplers():
    draws = [CleanerStages(3).draw(4, np.random.default_rng(seed)) for seed in range(3000)]
    shares = np.bincount(np.concatenate(draws), minlength=4) / 9000
    assert shares == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.02)
    for seed in range(20):
        draw = UniformStages(2).draw(4, np.random.default_rng(seed))
        assert len(set(draw)) == 2
        assert set(draw) <= set(range(4))
    assert UniformStages(9).draw(3, np.random.default_rng(0)) == EveryStage().draw(3, np.random.default_rng(0)) == (0, 1, 2)
    assert FinalStage(3).draw(4, np.random.default_rng(0)) == (3, 3, 3)


def test_clean_ends_have_the_velocities_that_vary_least():
    state, noise = normal(400, 2), normal(400, 2, seed=1)
    spread = {s: bridge_velocity(state, full(s), full(0.95), noise).var().item() for s in (0.0, 0.5, 0.75, 0.9)}
    assert list(spread.values()) == sorted(spread.values())
    assert spread[0.0] == pytest.approx(2, rel=0.1)  # e - x_0
    assert spread[0.9] > 40 * spread[0.0]


# --- groups ----------------------------------------------------------------------------------------------------------------------

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


# --- attribution -----------------------------------------------------------------------------------------------------------------

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


# --- directions ------------------------------------------------------------------------------------------------------------------


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
