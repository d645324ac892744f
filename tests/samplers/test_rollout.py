"""The rollout all samplers share: what it stores, what it costs, and what its numbers may depend on."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings

from diffalign import Prompt
from diffalign.core import CPS, ROOT, Euler, FlowSDE, Gaussian, Guided, Progress, Streams, TransitionKernel
from diffalign.core.transition import expand
from diffalign.policies import GaussianMixturePolicy
from diffalign.samplers import Branching, ChainSampler, DeterministicSampler, FixedPlan, TreeSampler, roll_out
from diffalign.testing import GivenPlan, TinyPolicy
from diffalign.testing.strategies import branchings

PROMPTS = [Prompt("a red cube"), Prompt("two blue stars"), Prompt("a red cube")]
HERE = Streams(3, 5)
TREE = Branching((1, 3, 1, 2, 1), (0.0, 0.7, 0.5, 1.0, 0.0))


def draw(policy, branching, prompts=PROMPTS, ids=None, streams=HERE, **options):
    condition = policy.encode(prompts)
    if ids is not None:
        condition = type(condition)(condition.prompts, torch.tensor(ids), condition.tensors)
    with torch.no_grad():
        return roll_out(policy, condition, branching, streams, **options)


def float64(**options):
    return TinyPolicy((2, 2), dtype=torch.float64, **options)


def nodes(forest):
    """(prompt id, level, place within the prompt's level) -> node."""
    table = {}
    for node, (prompt, level) in enumerate(zip(forest.prompt.tolist(), forest.level.tolist(), strict=True)):
        place = sum(1 for key in table if key[:2] == (int(forest.condition.ids[prompt]), level))
        table[int(forest.condition.ids[prompt]), level, place] = node
    return table


@given(branchings())
def test_leaves_and_costs_are_those_of_the_branching(branching):
    policy = TinyPolicy((2, 2))
    forest = draw(policy, branching)
    assert forest.samples.shape == (3 * branching.leaves, 2, 2)
    assert torch.bincount(forest.group).tolist() == [branching.leaves] * 3
    assert policy.counter.rows == 3 * branching.rollout_rows
    assert policy.counter.calls == len(branching.children)
    edges = sum(width for width, eta in zip(branching.widths[1:], branching.noise_levels, strict=True) if eta > 0)
    assert len(forest.stochastic) == 3 * edges
    assert torch.equal(forest.level[forest.stochastic], forest.level[forest.parent[forest.stochastic]] + 1)
    assert torch.equal(
        torch.bincount(forest.roots)[: 3 * branching.roots], torch.full((3 * branching.roots,), branching.leaves // branching.roots)
    )


@given(branchings())
def test_only_both_ends_of_stochastic_edges_are_stored_besides_roots_and_leaves(branching):
    steps = len(branching.children)
    noisy = {step for step, eta in enumerate(branching.noise_levels) if eta > 0}
    levels = {0, steps} | noisy | {step + 1 for step in noisy}
    assert set(draw(TinyPolicy(), branching).level.tolist()) == levels
    assert set(draw(TinyPolicy(), branching, keep_all=True).level.tolist()) == set(range(steps + 1))


@given(branchings())
def test_storing_every_level_changes_no_state(branching):
    policy = float64()
    some, every = draw(policy, branching), draw(policy, branching, keep_all=True)
    table = nodes(every)
    assert len(every.latents) == 3 * sum(branching.widths)
    for key, node in nodes(some).items():
        assert torch.equal(some.latents[node], every.latents[table[key]])
        assert some.log_prob[node] == every.log_prob[table[key]]
    assert torch.equal(some.path_sum(some.log_prob), every.path_sum(every.log_prob))


@given(branchings())
def test_leaves_stand_depth_first_and_siblings_together(branching):
    forest = draw(TinyPolicy(), branching)
    paths = forest.paths.tolist()
    assert paths == sorted(paths)
    for parent in set(forest.parent.tolist()) - {ROOT}:
        children = (forest.parent == parent).nonzero().squeeze(1)
        assert (children.diff() == 1).all()


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("kernel", [CPS(), FlowSDE("sum")], ids=repr)
def test_the_row_budget_changes_nothing(rows, kernel):
    policy = float64(kernel=kernel)
    whole, pieces = draw(policy, TREE), draw(policy, TREE, rows=rows)
    for name in ("latents", "log_prob", "mean"):
        torch.testing.assert_close(getattr(pieces, name), getattr(whole, name), rtol=1e-12, atol=1e-12)
    for name in ("level", "parent", "prompt", "noise_level"):
        assert torch.equal(getattr(pieces, name), getattr(whole, name))


def test_the_row_budget_bounds_every_call():
    policy, sizes = TinyPolicy(), []
    policy.network.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    draw(policy, TREE, rows=4)
    assert max(sizes) == 4
    assert sum(sizes) == policy.counter.rows == 3 * TREE.rollout_rows


@pytest.mark.parametrize("keep", [[0], [2], [2, 0], [2, 1, 0], [1, 2]])
def test_a_prompt_is_rolled_out_alike_in_any_company(keep):
    policy = float64()
    whole, part = draw(policy, TREE), draw(policy, TREE, [PROMPTS[index] for index in keep], ids=keep)
    table = nodes(whole)
    for key, node in nodes(part).items():
        torch.testing.assert_close(part.latents[node], whole.latents[table[key]], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(part.log_prob[node], whole.log_prob[table[key]], rtol=1e-12, atol=1e-12)


def test_equal_prompts_under_different_ids_get_different_noise():
    forest = draw(float64(), TREE)
    first, last = forest.samples[forest.group == 0], forest.samples[forest.group == 2]
    assert not (first == last).any()


@given(branchings())
@settings(max_examples=10)
def test_noise_is_keyed_by_prompt_id_level_and_place(branching):
    policy, streams = float64(), Streams(1, 2)
    forest = draw(policy, branching, ids=[7, 3, 5], streams=streams)
    row = {int(node): index for index, node in enumerate(forest.stochastic)}
    for (prompt_id, level, place), node in nodes(forest).items():
        noise = streams.normal((2, 2), "rollout", prompt_id, (level << 32) + place).double()
        if level == 0:
            assert torch.equal(forest.latents[node], noise)
        elif node in row:
            std = forest.sigmas[level] * math.sin(math.pi / 2 * float(forest.noise_level[node]))
            torch.testing.assert_close((forest.latents[node] - forest.mean[row[node]]) / std, noise, rtol=1e-5, atol=1e-5)


def test_seed_and_step_change_the_noise():
    here = draw(TinyPolicy(), TREE).latents
    assert not torch.equal(here, draw(TinyPolicy(), TREE, streams=Streams(4, 5)).latents)
    assert not torch.equal(here, draw(TinyPolicy(), TREE, streams=Streams(3, 6)).latents)


@pytest.mark.parametrize("kernel", [CPS(), FlowSDE(), Euler()])
def test_without_noise_a_rollout_is_the_euler_method(kernel):
    policy = float64(kernel=kernel)
    forest = draw(policy, Branching((1,) * 4, (0.0,) * 4, roots=2))
    condition = policy.encode(PROMPTS).select(torch.arange(3).repeat_interleave(2))
    x = torch.stack([HERE.normal((2, 2), "rollout", prompt, place).double() for prompt in range(3) for place in range(2)])
    sigmas = policy.sigmas(4)
    with torch.no_grad():
        for sigma, following in pairwise(sigmas):
            x = x + (following - sigma) * policy.velocity(x, sigma.expand(6), condition)
    torch.testing.assert_close(forest.samples, x, rtol=1e-12, atol=1e-12)
    assert (forest.log_prob == 0).all()
    assert len(forest.mean) == 0


def test_a_chain_is_a_tree_that_never_branches():
    policy = float64()
    chains = ChainSampler(5, samples=3, window=(1, 4))
    tree = TreeSampler(5, GivenPlan(Branching((1,) * 5, (0.0, 0.7, 0.7, 0.7, 0.0), roots=3)))
    condition, here = policy.encode(PROMPTS), (Progress(0, 1), Streams(3, 5))
    with torch.no_grad():
        one, other = (sampler.sample(policy, condition, *here) for sampler in (chains, tree))
    for name in ("latents", "log_prob", "mean", "parent", "level"):
        assert torch.equal(getattr(one, name), getattr(other, name))


@given(branchings())
@settings(max_examples=15)
def test_the_first_leaf_of_a_tree_is_the_first_chain_with_the_same_noise(branching):
    policy = float64()
    tree = draw(policy, branching)
    chain = draw(policy, Branching((1,) * len(branching.children), branching.noise_levels, branching.roots))
    for prompt in range(3):
        first = tree.path_sum(tree.log_prob)[tree.group == prompt][0]
        alone = chain.path_sum(chain.log_prob)[chain.group == prompt][0]
        torch.testing.assert_close(tree.samples[tree.group == prompt][0], chain.samples[chain.group == prompt][0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(first, alone, rtol=1e-12, atol=1e-12)


def test_deterministic_samples_store_every_level():
    policy = float64()
    with torch.no_grad():
        forest = DeterministicSampler(4, samples=2).sample(policy, policy.encode(PROMPTS), Progress(0, 1), Streams(0))
    assert forest.paths.shape == (6, 5)
    assert torch.equal(forest.level[forest.paths], torch.arange(5).expand(6, 5))


@pytest.mark.parametrize(("sampler", "frontier"), [(TreeSampler, 81), (ChainSampler, 48), (DeterministicSampler, 48)])
def test_samplers_hand_their_row_budget_on(sampler, frontier):
    policy, sizes = TinyPolicy(), []
    policy.network.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    for rows in (None, 2):
        sizes.clear()
        with torch.no_grad():
            sampler(steps=5, rows=rows).sample(policy, policy.encode(PROMPTS), Progress(0, 1), Streams(0))
        assert max(sizes) == (rows or frontier)


def test_a_step_of_the_paper_costs_42_rows_in_6_calls():
    policy, sizes = TinyPolicy(), []
    policy.network.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    with torch.no_grad():
        TreeSampler(6, FixedPlan((2, 3, 4))).sample(policy, policy.encode(PROMPTS[:1]), Progress(0, 1), Streams(0))
    assert sizes == [1, 1, 1, 3, 9, 27]


def test_guidance_doubles_the_rows():
    policy = TinyPolicy()
    draw(Guided(policy, 2.0), TREE)
    assert policy.counter.rows == 2 * 3 * TREE.rollout_rows


def test_a_stochastic_step_to_sigma_0_is_refused_where_the_kernel_has_no_noise():
    with pytest.raises(ValueError, match=r"step 2 \(sigma 0.5 -> 0\) is planned with eta 0.7, but CPS has no noise there"):
        draw(TinyPolicy(), Branching((1, 1, 2), (0.0, 0.0, 0.7)))
    assert draw(TinyPolicy(kernel=FlowSDE()), Branching((1, 1, 2), (0.0, 0.0, 0.7))).log_prob.isfinite().all()


def test_a_kernel_without_noise_refuses_a_stochastic_plan():
    with pytest.raises(ValueError, match="Use CPS or FlowSDE"):
        draw(TinyPolicy(kernel=Euler()), TREE)


def test_more_noise_than_the_kernel_has_is_refused():
    """Above eta 1 the cosine of CPS is negative: the predicted noise would enter with the wrong sign."""
    plan = Branching((1, 2, 1), (0.0, 1.2, 0.0))
    with pytest.raises(ValueError, match=r"^the eta of every step must be at most 1 for CPS; step 1 is planned with 1\.2\."):
        draw(TinyPolicy(), plan)
    with pytest.raises(ValueError, match="must be at most 1 for CPS"):
        ChainSampler(4, 3, eta=1.5).outline(TinyPolicy())
    assert draw(TinyPolicy(), Branching((1, 2, 1), (0.0, 1.0, 0.0))).log_prob.isfinite().all()
    assert draw(TinyPolicy(kernel=FlowSDE()), plan).log_prob.isfinite().all()


def test_a_kernel_that_states_no_largest_eta_takes_any():
    class Doubled(TransitionKernel):
        def step(self, latents, velocity, sigma, sigma_next, noise_level):
            return Gaussian(latents + expand(sigma_next - sigma, latents) * velocity, 2 * noise_level, self.density)

    assert draw(TinyPolicy(kernel=Doubled()), Branching((1, 2, 1), (0.0, 5.0, 0.0))).log_prob.isfinite().all()


def test_flow_sde_refuses_a_stochastic_first_step():
    with pytest.raises(ValueError, match="Start the stochastic steps at step 1"):
        draw(TinyPolicy(kernel=FlowSDE()), Branching((2, 1), (0.7, 0.0)))


def test_a_grid_of_another_length_is_refused():
    class Short(TinyPolicy):
        def sigmas(self, steps):
            return torch.linspace(1, 0, steps)

    with pytest.raises(ValueError, match=r"Short.sigmas\(5\) must have 6 entries; got 5"):
        draw(Short(), TREE)


@pytest.mark.parametrize("kernel", [CPS(), FlowSDE()])
def test_samples_of_gaussian_data_have_the_moments_of_the_closed_form(kernel):
    """Every step is linear in x, so mean and variance of the leaves follow from the steps' slopes, step by step."""
    m, c, steps, etas, count = 1.5, 0.8, 6, (0.0, 0.7, 0.7, 0.7, 0.7, 0.0), 1500
    policy = GaussianMixturePolicy(torch.tensor([[m, -m]], dtype=torch.float64), c, kernel=kernel)
    forest = draw(policy, Branching((1,) * steps, etas, roots=count), prompts=PROMPTS[:1])

    mean, variance = 0.0, 1.0
    points = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    for sigma, following, eta in zip(policy.sigmas(steps), policy.sigmas(steps)[1:], etas, strict=False):
        columns = [torch.full((2,), float(number), dtype=torch.float64) for number in (sigma, following, eta)]
        with torch.no_grad():
            gaussian = policy.transition(points, columns[0], columns[1], policy.encode(PROMPTS[:2]), columns[2])
        slope = float(gaussian.mean[1, 0] - gaussian.mean[0, 0])
        mean, variance = float(gaussian.mean[0, 0]) + slope * mean, slope**2 * variance + float(gaussian.std[0]) ** 2
    samples = forest.samples * torch.tensor([1.0, -1.0])  # the second dimension is the mirror image of the first
    assert mean == pytest.approx(m, abs=1e-9)
    assert (samples.mean(dim=0) - m).abs().max() < 4.5 * math.sqrt(variance / count)
    assert (samples.var(dim=0) - variance).abs().max() < 4.5 * variance * math.sqrt(2 / count)
    sorted_, n = samples.flatten().sort().values, samples.numel()
    cdf = torch.distributions.Normal(mean, math.sqrt(variance)).cdf(sorted_)
    steps_ = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((cdf - steps_[:-1]).abs(), (steps_[1:] - cdf).abs()).max()
    assert distance < 1.95 / math.sqrt(n)  # Kolmogorov-Smirnov at 0.1 %
