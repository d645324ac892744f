"""Components of few-step training, each against its formula: noising, fake targets, query times, intervals and stages."""

import math

import numpy as np
import pytest
import torch
from few_step_numbers import LEVELS, full, normal
from hypothesis import given
from hypothesis import strategies as st

from diffalign.objectives.few_step import (
    CleanerStages,
    CleanTarget,
    EveryStage,
    ExactTarget,
    FinalStage,
    FixedTime,
    LogitNormalTime,
    Overlap,
    Separate,
    ShiftedTime,
    UniformStages,
    WeightedCleanTarget,
)
from diffalign.objectives.few_step.fake_targets import NoisedEnds
from diffalign.objectives.few_step.query_times import shift_time, unshift_time
from diffalign.objectives.noising import bridge_velocity, diffuse, kernel


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


@pytest.mark.parametrize("size", [1, 3, 8])
def test_the_weight_that_is_not_tempered_is_the_ratio_of_two_gaussian_densities(size):
    """N(x_tau; (1 - tau) xhat0, tau^2) / N(x_tau; a x, b^2), whose mean over x and x_tau is 1."""
    s, tau, count = 0.6, 0.95, 200_000
    clean, carried, e = (normal(count, size, seed=seed) for seed in range(3))
    end = (1 - s) * clean + s * carried
    noised = diffuse(end, full(s, count), full(tau, count), e)
    _, weight = WeightedCleanTarget(cap=100.0, tempered=False)(NoisedEnds(end, clean, full(s, count), full(tau, count), e, noised))
    ratio = weight / (1 - tau) ** 2
    a, b = (value.item() for value in kernel(full(s), full(tau)))
    wanted, drawn = torch.distributions.Normal((1 - tau) * clean, tau), torch.distributions.Normal(a * end, b)
    torch.testing.assert_close(ratio, (wanted.log_prob(noised) - drawn.log_prob(noised)).sum(dim=1).exp())
    assert ratio.mean().item() == pytest.approx(1.0, abs=5 * ratio.std().item() / math.sqrt(count))


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
