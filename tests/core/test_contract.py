"""Before the first update, replay reproduces the rollout, or the run stops with the level at which it does not."""

import math

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffalign import Progress, Prompt, Streams
from diffalign.core import CPS, FlowSDE, first_step_deviation
from diffalign.samplers import Branching, ChainSampler, DeterministicSampler, TreeSampler
from diffalign.testing import GivenPlan, SlippedReplay, TinyPolicy
from diffalign.testing.strategies import branchings

TREE = TreeSampler(5, GivenPlan(Branching((1, 3, 1, 2, 1), (0.0, 0.7, 0.5, 1.0, 0.0))))


def sample(policy, sampler):
    with torch.no_grad():
        return sampler.sample(policy, policy.encode([Prompt("a red cube"), Prompt("two blue stars")]), Progress(0, 1), Streams(0))


@pytest.mark.parametrize("kernel", [CPS(), FlowSDE()])
@given(data=st.data())
def test_an_honest_policy_keeps_it(kernel, data):
    branching = data.draw(branchings(first=1))
    policy = TinyPolicy((2, 2), kernel=kernel)
    forest = sample(policy, TreeSampler(len(branching.children), GivenPlan(branching)))
    assert 0 <= first_step_deviation(policy, forest, parents=100, tolerance=1e-4) <= 1e-5


def test_a_forest_without_noise_has_nothing_to_compare():
    policy = TinyPolicy()
    rows = policy.counter.rows
    assert first_step_deviation(policy.fork(pristine=True), sample(policy, DeterministicSampler(3)), 2, 1e-4) == 0.0
    assert policy.counter.rows - rows == 2 * 3


@pytest.mark.parametrize(("parents", "rows"), [(1, 1), (2, 2), (5, 5), (1000, 2 * (1 + 3 + 3))])
def test_no_more_rows_are_spent_than_allowed(parents, rows):
    policy = TinyPolicy()
    forest = sample(policy, TREE)
    before = policy.counter.rows
    first_step_deviation(policy, forest, parents, 1e-4)
    assert policy.counter.rows - before == rows


def test_the_deviation_is_in_units_of_the_std():
    policy = TinyPolicy((2, 2), dtype=torch.float64)
    forest = sample(policy, TREE)
    edge = 4
    shift = torch.zeros_like(forest.mean)
    shift[edge, 1, 0] = 3e-3
    child = forest.stochastic[edge]
    level = forest.level[forest.parent[child]]
    std = forest.sigmas[level + 1] * math.sin(math.pi / 2 * float(forest.noise_level[child]))
    deviation = first_step_deviation(policy, attrs.evolve(forest, mean=forest.mean + shift), 100, tolerance=1.0)
    assert deviation == pytest.approx(3e-3 / float(std), rel=1e-6)


@pytest.mark.parametrize("sampler", [TREE, ChainSampler(5, samples=3)])
def test_a_slip_of_one_sigma_index_is_found_and_its_level_named(sampler):
    policy = SlippedReplay(TinyPolicy(), 5)
    forest = sample(policy, sampler)
    sigmas = policy.sigmas(5)
    with pytest.raises(
        RuntimeError, match=r"must agree to 0.0001 std before the first update; they differ by .* std at level 1 "
    ) as caught:
        first_step_deviation(policy, forest, parents=1, tolerance=1e-4)
    assert f"(sigma {sigmas[1]:.4g} -> {sigmas[2]:.4g})" in str(caught.value)


def test_moved_weights_are_found():
    policy = TinyPolicy()
    forest = sample(policy, TREE)
    with torch.no_grad():
        policy.network.lora_B.weight += 1e-2
    with pytest.raises(RuntimeError, match="not the same function in rollout and replay"):
        first_step_deviation(policy, forest, 2, 1e-4)


def test_a_mean_that_is_not_a_number_is_found():
    policy = TinyPolicy()
    forest = sample(policy, TREE)
    with torch.no_grad():
        policy.network.lora_B.weight[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="they differ by nan std"):
        first_step_deviation(policy, forest, 2, 1e-4)
