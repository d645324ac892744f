"""Group reductions against a loop over groups; aggregation and diversity against their formulas and the release's numbers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffalign.core import (
    Raw,
    RunningScale,
    StandardizedParts,
    StandardizedSum,
    group_log_softmax,
    group_mean,
    group_normalize,
    group_std,
    group_sum,
    log_geometric_mean_distance,
)
from diffalign.testing.strategies import reward_groups

REDUCTIONS = {
    group_sum: lambda values: values.sum().expand_as(values),
    group_mean: lambda values: values.mean().expand_as(values),
    group_std: lambda values: values.std(unbiased=False).expand_as(values),
    group_log_softmax: lambda values: values.log_softmax(dim=0),
    group_normalize: lambda values: (values - values.mean()) / values.std(unbiased=False).clamp(min=1e-4),
}
ALL = pytest.mark.parametrize("reduce", list(REDUCTIONS), ids=lambda function: function.__name__)


@ALL
@given(groups=reward_groups())
def test_reductions_equal_a_loop_over_groups(reduce, groups):
    values, group = groups
    expected = torch.zeros_like(values)
    for index in group.unique():
        expected[group == index] = REDUCTIONS[reduce](values[group == index])
    torch.testing.assert_close(reduce(values, group), expected, rtol=1e-9, atol=1e-9)


@ALL
@given(groups=reward_groups(), seed=st.integers(0, 100))
def test_reductions_follow_a_permutation_of_the_samples(reduce, groups, seed):
    values, group = groups
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(reduce(values[order], group[order]), reduce(values, group)[order], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reduce", [group_sum, group_mean, group_log_softmax, group_normalize], ids=lambda function: function.__name__)
def test_gradients_of_reductions_are_exact(reduce):
    values = torch.tensor([0.3, -1.0, 2.0, 0.5, 1.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda values: reduce(values, torch.tensor([1, 0, 1, 2, 1])), values)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [3, 9, 27])
def test_equal_values_have_no_spread_at_all(kind, size):
    constants = torch.linspace(-2, 2, 401, dtype=kind)  # the rounded mean of `size` of them often is another number
    values, group = constants.repeat_interleave(size), torch.arange(401).repeat_interleave(size)
    assert torch.equal(group_std(values, group), torch.zeros_like(values))
    assert torch.equal(group_normalize(values, group), torch.zeros_like(values))
    assert bool(((values - group_mean(values, group)) != 0).any())


def test_a_group_of_numbers_that_are_not_finite_is_not_called_equal():
    values = torch.tensor([math.nan, math.nan, math.inf, math.inf, 1.0])
    assert group_std(values, torch.tensor([0, 0, 1, 1, 2])).isnan().tolist() == [True, True, True, True, False]


@ALL
def test_no_samples_are_no_numbers(reduce):
    assert reduce(torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)


@given(reward_groups(), st.floats(-100, 100))
def test_log_softmax_ignores_a_shift_and_sums_to_one(groups, shift):
    values, group = groups
    logs = group_log_softmax(values, group)
    torch.testing.assert_close(group_log_softmax(values + shift * (1 + group), group), logs, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(group_sum(logs.exp(), group), torch.ones_like(values), rtol=1e-12, atol=0)


def test_log_softmax_survives_extremes():
    logs = group_log_softmax(torch.tensor([1e5, -1e5, -1e5, 1e5]), torch.tensor([0, 0, 1, 1]))
    assert logs.tolist() == [0.0, -2e5, -2e5, 0.0]


@given(reward_groups(), st.floats(0.5, 10), st.floats(-10, 10))
def test_normalize_ignores_scale_and_shift_where_groups_have_spread(groups, scale, shift):
    values, group = groups
    spread = group_std(values, group) > 1e-2
    moved = group_normalize(scale * values + shift, group)
    torch.testing.assert_close(moved[spread], group_normalize(values, group)[spread], rtol=1e-8, atol=1e-8)
    assert (group_normalize(torch.ones_like(values), group) == 0).all()


PARTS = {"a": torch.tensor([1.0, 2.0, 3.0, 10.0, 10.0]), "b": torch.tensor([0.0, 0.0, 3.0, 5.0, 1.0])}
GROUP = torch.tensor([0, 0, 0, 1, 1])


def test_raw_is_the_weighted_sum():
    assert Raw()(PARTS, GROUP).tolist() == [1.0, 2.0, 6.0, 15.0, 11.0]
    assert Raw({"b": -2.0})(PARTS, GROUP).tolist() == [0.0, 0.0, -6.0, -10.0, -2.0]  # "a" is logged, not trained on


def test_standardized_parts_standardises_before_it_weighs():
    # group 0: a = (-1, 0, 1) / sqrt(2/3), b = (-1, -1, 2) / sqrt(2); group 1: a is constant, b = (1, -1)
    a, b = math.sqrt(1.5), 1 / math.sqrt(2)
    expected = torch.tensor([-a - 2 * b, -2 * b, a + 4 * b, 2.0, -2.0])
    torch.testing.assert_close(StandardizedParts({"a": 1.0, "b": 2.0})(PARTS, GROUP), expected)


def test_standardized_sum_standardises_after_it_weighs():
    # group 0: (1, 2, 6) has mean 3 and variance 14/3; group 1: (15, 11) has mean 13 and std 2
    expected = torch.tensor([-2.0, -1.0, 3.0, 0.0, 0.0]) / math.sqrt(14 / 3) + torch.tensor([0.0, 0.0, 0.0, 1.0, -1.0])
    torch.testing.assert_close(StandardizedSum()(PARTS, GROUP), expected)


@given(st.floats(0.5, 20), st.floats(-5, 5))
def test_aggregations_ignore_what_they_should(scale, shift):
    moved = {"a": scale * PARTS["a"] + shift, "b": PARTS["b"]}
    torch.testing.assert_close(StandardizedParts()(moved, GROUP), StandardizedParts()(PARTS, GROUP), rtol=1e-4, atol=1e-4)
    both = {name: scale * values + shift for name, values in PARTS.items()}
    torch.testing.assert_close(StandardizedSum()(both, GROUP), StandardizedSum()(PARTS, GROUP), rtol=1e-4, atol=1e-4)


def test_a_constant_reward_contributes_nothing_where_parts_are_standardised():
    constant = {"a": PARTS["a"], "c": torch.full((5,), 0.3)}
    torch.testing.assert_close(StandardizedParts()(constant, GROUP), StandardizedParts({"a": 1.0})(PARTS, GROUP))


@pytest.mark.parametrize("aggregation", [Raw({"c": 1.0}), StandardizedParts({"c": 1.0}), StandardizedSum({"c": 1.0})])
def test_a_weight_for_no_reward_is_refused(aggregation):
    with pytest.raises(ValueError, match=r"aggregation.weights names the reward 'c', but the rewards are a, b"):
        aggregation(PARTS, GROUP)


@pytest.mark.parametrize("kind", [Raw, StandardizedParts, StandardizedSum, RunningScale])
def test_weights_that_leave_out_every_reward_are_refused(kind):
    with pytest.raises(ValueError, match=rf"^{kind.__name__}\.weights must name at least one reward, or be None, .*; got {{}}$"):
        kind({})
    assert kind().weights is None
    assert kind({"r": 0.0}).weights == {"r": 0.0}


@pytest.mark.parametrize("kind", [StandardizedParts, StandardizedSum])
def test_the_floor_is_positive(kind):
    with pytest.raises(ValueError, match="floor"):
        kind(floor=0.0)


def test_aggregations_agree_with_the_release(golden):
    kinds = {"raw_aggr": Raw, "advantage_aggr": StandardizedParts, "reward_aggr": StandardizedSum}
    for row in golden["reward_aggregation"]:
        parts = {name: torch.tensor(values) for name, values in row["scores"].items()}
        got = kinds[row["mode"]](row["weights"])(parts, torch.zeros(len(row["final"]), dtype=torch.long))
        torch.testing.assert_close(got, torch.tensor(row["final"]), rtol=1e-6, atol=2e-6)


def spread(latents, *group):
    return log_geometric_mean_distance(latents, torch.tensor(group)).tolist()


def test_diversity_of_two_points_is_the_log_of_their_distance_per_dimension():
    latents = torch.tensor([[0.0, 0.0], [3.0, 4.0], [7.0, 7.0]])
    assert spread(latents, 0, 0, 1) == pytest.approx([math.log(5 / math.sqrt(2)), 0.0])  # a group of one has none


def test_diversity_of_three_points_is_the_mean_over_pairs():
    latents = torch.tensor([[0.0], [1.0], [3.0]])
    assert spread(latents, 0, 0, 0) == pytest.approx([(math.log(1) + math.log(3) + math.log(2)) / 3])


@given(st.floats(0.1, 10), st.floats(-5, 5), st.integers(0, 50))
def test_diversity_follows_scale_and_ignores_translation_and_order(scale, shift, seed):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(5, 2, 3, generator=generator, dtype=torch.float64)
    (base,) = spread(latents, 0, 0, 0, 0, 0)
    assert spread(scale * latents, 0, 0, 0, 0, 0) == pytest.approx([base + math.log(scale)])
    assert spread(latents + shift, 0, 0, 0, 0, 0) == pytest.approx([base])
    assert spread(latents[torch.randperm(5, generator=generator)], 0, 0, 0, 0, 0) == pytest.approx([base])


def test_a_duplicate_pair_adds_the_log_of_the_floor():
    latents = torch.tensor([[0.0], [0.0], [1.0]])
    assert spread(latents, 0, 0, 0) == pytest.approx([math.log(1e-8) / 3])


def test_no_samples_have_no_diversity():
    assert log_geometric_mean_distance(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_diversity_agrees_with_the_release(golden):
    for row in golden["diversity"]:
        latents = torch.tensor(row["features"])
        got = log_geometric_mean_distance(latents, torch.zeros(len(latents), dtype=torch.long))
        assert got.item() == pytest.approx(row["lgmd"], rel=1e-6)
