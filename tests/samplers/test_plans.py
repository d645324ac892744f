"""Where a rollout branches: counts, and everything that is refused before a network is called."""

import math

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffalign.core import Progress, Prompt, Streams
from diffalign.samplers import Branching, ChainSampler, DeterministicSampler, FixedPlan, Plan, TreeSampler
from diffalign.testing import GivenPlan, TinyPolicy
from diffalign.testing.strategies import branchings

HERE = (Progress(0, 1), Streams(0))


@given(branchings())
def test_counts_are_products_of_widths(branching):
    assert branching.leaves == branching.roots * math.prod(branching.children)
    assert branching.widths[0] == branching.roots
    for before, children, after in zip(branching.widths, branching.children, branching.widths[1:], strict=False):
        assert after == before * children
    assert branching.rollout_rows == sum(branching.widths[:-1])
    noisy = [width for width, eta in zip(branching.widths[:-1], branching.noise_levels, strict=True) if eta > 0]
    assert branching.replay_rows == sum(noisy)


@given(branchings(comparable=True))
def test_no_branching_is_without_noise_and_no_edge_is_shared_by_all_leaves(branching):
    for step, (children, eta) in enumerate(zip(branching.children, branching.noise_levels, strict=True)):
        assert eta > 0 or children == 1
        assert eta == 0 or branching.widths[step + 1] > 1
    assert branching.leaves >= 2


NOT_OURS = {
    (1, 4, 4): "two splits at one step: the release silently loses a level, 9 leaves for 27",
    (1, 3, 5): "a split of the last step, which has no noise: its three children are equal",
}
"""Splits of golden rows that record defects of the release."""


def test_topologies_agree_with_the_release(golden):
    refused = set()
    for row in golden["tree_topology"]:
        if not row["splits"]:
            branching = DeterministicSampler(row["T"], samples=row["roots"]).branching()
        else:
            settings = {"roots": row["roots"], "levels": row["branch_levels"], "max_leaves": row["max_leaves"], "promote_roots": True}
            if tuple(row["splits"]) in NOT_OURS:
                with pytest.raises(ValueError, match=r"FixedPlan\.splits must"):
                    TreeSampler(row["T"], FixedPlan(row["splits"], row["k"], **settings))
                refused.add(tuple(row["splits"]))
                continue
            branching = FixedPlan(row["splits"], row["k"], **settings).draw(row["T"], *HERE)
        assert branching.leaves == row["leaves"]
        assert branching.rollout_rows == row["rollout_forward_calls"]
        assert branching.replay_rows == sum(row.get("unique_latents", []))
        assert sum(eta > 0 for eta in branching.noise_levels) == row["recorded_sde_steps"]
    assert refused == set(NOT_OURS)


def test_a_tree_of_the_paper_costs_42_rows_and_replays_13():
    branching = FixedPlan((2, 3, 4)).draw(6, *HERE)
    assert branching == Branching((1, 1, 3, 3, 3, 1), (0.0, 0.0, 0.7, 0.7, 0.7, 0.0))
    assert (branching.leaves, branching.rollout_rows, branching.replay_rows) == (27, 42, 13)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((1, 1), (0.0,)), "Branching.noise_levels must have 2 entries, one per step; got 1"),
        (((0, 1), (0.0, 0.0)), "step 0 has 0 children and eta 0; they must be at least 1 and 0"),
        (((1, 1), (0.0, -0.5)), "step 1 has 1 children and eta -0.5"),
        (((1, 3), (0.0, 0.0)), "step 1 branches 3-fold without noise, so its children are equal; give it eta > 0"),
        (((1, 1, 3), (0.0, 0.7, 0.7)), r"step 1 is stochastic before the first branching \(step 2\); all leaves share that edge"),
        (((1, 1), (0.0, 0.0), 0), "roots"),
    ],
)
def test_a_branching_that_can_teach_nothing_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Branching(*arguments)


def test_a_stochastic_step_above_the_first_branching_is_allowed_with_several_roots():
    assert Branching((1, 3), (0.7, 0.7), roots=2).leaves == 6


@given(st.integers(2, 9), st.integers(2, 4), st.integers(1, 3), st.data())
def test_a_fixed_plan_branches_at_its_splits_alone(steps, branches, roots, data):
    splits = sorted(data.draw(st.sets(st.integers(0, steps - 2), min_size=1, max_size=3)))
    etas = data.draw(st.lists(st.floats(0.1, 1.0), min_size=len(splits), max_size=len(splits)))
    branching = FixedPlan(splits, branches, etas, roots).draw(steps, *HERE)
    assert branching.leaves == roots * branches ** len(splits)
    assert [step for step, children in enumerate(branching.children) if children == branches] == splits
    assert [eta for eta in branching.noise_levels if eta] == etas
    assert branching == FixedPlan(splits, branches, etas, roots).draw(steps, Progress(7, 9, 0.3), Streams(5, 7))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"splits": ()}, "FixedPlan.splits must name at least one step; got none. For independent samples use ChainSampler."),
        ({"splits": (1, 1, 2)}, r"splits must increase strictly, because each is a level of the tree; got \[1, 1, 2\]"),
        ({"splits": (2, 1)}, r"splits must increase strictly, because each is a level of the tree; got \[2, 1\]"),
        ({"eta": (0.5, 0.6)}, "FixedPlan.eta must be one number or 3, one per split; got 2"),
        ({"branches": 1}, "branches"),
        ({"roots": 0}, "roots"),
    ],
)
def test_a_plan_that_no_rollout_can_follow_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        FixedPlan(**arguments)


@pytest.mark.parametrize(("splits", "steps"), [((-1, 2), 6), ((2, 5), 6), ((2, 9), 6), ((1, 2, 3), 4)])
def test_a_tree_sampler_refuses_a_plan_that_does_not_fit_when_it_is_built(splits, steps):
    with pytest.raises(ValueError, match=rf"splits must lie in \[0, {steps - 2}\] for {steps} steps .*; got \[{str(list(splits))[1:-1]}\]"):
        TreeSampler(steps, FixedPlan(splits))


def test_a_tree_sampler_refuses_branches_without_noise_when_it_is_built():
    with pytest.raises(ValueError, match="branches 3-fold without noise"):
        TreeSampler(6, FixedPlan((1, 2), eta=(0.7, 0.0)))


def test_a_given_plan_is_for_its_own_number_of_steps():
    with pytest.raises(ValueError, match=r"GivenPlan.branching is for 2 steps; the sampler has 3"):
        TreeSampler(3, GivenPlan(Branching((1, 1), (0.5, 0.0))))


def test_a_plan_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        Plan()


@pytest.mark.parametrize(
    ("sampler", "arguments"),
    [
        (TreeSampler, {"steps": 1}),
        (TreeSampler, {"rows": 0}),
        (ChainSampler, {"steps": 2}),
        (ChainSampler, {"samples": 0}),
        (ChainSampler, {"eta": 0.0}),
        (ChainSampler, {"rows": 0}),
        (DeterministicSampler, {"steps": 0}),
        (DeterministicSampler, {"samples": 0}),
        (DeterministicSampler, {"rows": 0}),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(sampler, arguments):
    with pytest.raises(ValueError, match=f"'{next(iter(arguments))}' must be >"):
        sampler(**arguments)


def test_chains_are_stochastic_in_their_window_alone():
    assert ChainSampler(6, samples=4).branching() == Branching((1,) * 6, (0.0, 0.7, 0.7, 0.7, 0.7, 0.0), roots=4)
    assert ChainSampler(6, samples=4, eta=0.5, window=(2, 4)).branching().noise_levels == (0.0, 0.0, 0.5, 0.5, 0.0, 0.0)
    assert ChainSampler(6, window=[0, 5]).branching().noise_levels == (0.7,) * 5 + (0.0,)


@pytest.mark.parametrize("window", [(0, 6), (3, 3), (4, 2), (-1, 3), (1,), (1, 2, 3)])
def test_a_window_outside_the_steps_is_refused(window):
    with pytest.raises(ValueError, match=r"ChainSampler.window must be \(first, end\) with 0 <= first < end < 6 steps; got"):
        ChainSampler(6, window=window)


def test_deterministic_samples_are_roots_without_noise():
    assert DeterministicSampler(3, samples=2).branching() == Branching((1, 1, 1), (0.0, 0.0, 0.0), roots=2)


def test_root_promotion_trades_the_first_split_for_roots():
    plan = FixedPlan((1, 3, 4), promote_roots=True)
    assert plan.draw(6, *HERE) == Branching((1, 1, 1, 3, 3, 1), (0.0, 0.0, 0.0, 0.7, 0.7, 0.0), roots=3)
    assert (plan.draw(6, *HERE).rollout_rows, plan.draw(6, *HERE).replay_rows) == (48, 12)
    later = FixedPlan((2, 3, 4), promote_roots=True)
    assert later.draw(6, *HERE) == FixedPlan((2, 3, 4)).draw(6, *HERE)
    assert FixedPlan((2,), promote_roots=True).draw(6, *HERE) == FixedPlan((2,)).draw(6, *HERE)
    assert FixedPlan((0, 3), eta=(0.2, 0.9), promote_roots=True).draw(6, *HERE).noise_levels == (0.0, 0.0, 0.0, 0.9, 0.0, 0.0)


def test_levels_and_the_cap_on_leaves_keep_later_splits_stochastic():
    once = FixedPlan((1, 2, 3), levels=1).draw(6, *HERE)
    assert (once.children, once.noise_levels) == ((1, 3, 1, 1, 1, 1), (0.0, 0.7, 0.7, 0.7, 0.0, 0.0))
    assert FixedPlan((1, 2, 3), max_leaves=26).draw(6, *HERE).leaves == 9
    assert FixedPlan((1, 2, 3), max_leaves=27).draw(6, *HERE).leaves == 27
    assert FixedPlan((1, 2, 3), roots=2, max_leaves=2).draw(6, *HERE).leaves == 2


def test_without_levels_a_tree_is_chains():
    chains = ChainSampler(6, samples=5, eta=0.7, window=(1, 4)).branching()
    assert FixedPlan((1, 2, 3), roots=5, levels=0).draw(6, *HERE) == chains


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"levels": 4}, "FixedPlan.levels must be at most 3, the number of splits; got 4"),
        ({"roots": 4, "max_leaves": 3}, "FixedPlan.max_leaves must be at least the number of roots, 4; got 3"),
        ({"splits": (1,), "promote_roots": True}, "FixedPlan.promote_roots needs a second split: .* no other step is stochastic"),
    ],
)
def test_options_that_contradict_each_other_are_refused_when_the_sampler_is_built(arguments, message):
    with pytest.raises(ValueError, match=message):
        TreeSampler(6, FixedPlan(**arguments))


@attrs.frozen
class LaterPlan(Plan):
    """Draws what fits at the first step of a run, and something else from the second on."""

    later: object
    first: object = Branching((1, 3, 1, 1, 1, 1), (0.0, 0.7, 0.0, 0.0, 0.0, 0.0))

    def draw(self, steps, progress, streams):
        return self.later if progress.step else self.first


SHORT = Branching((1, 3, 1), (0.0, 0.7, 0.0))
LONG = Branching((1, 3, 1, 1, 1, 1, 1), (0.0, 0.7, 0.0, 0.0, 0.0, 0.0, 0.0))


@pytest.mark.parametrize("drawn", [SHORT, LONG], ids=["short", "long"])
def test_a_draw_of_another_number_of_steps_is_refused(drawn):
    wanted = rf"LaterPlan.draw must return a Branching of 6 denoising steps.* at step {{}} of the run .* one of {len(drawn.children)}\."
    with pytest.raises(ValueError, match=wanted.format(0)):
        TreeSampler(6, LaterPlan(drawn, drawn))
    sampler, policy = TreeSampler(6, LaterPlan(drawn)), TinyPolicy((2, 2))
    with pytest.raises(ValueError, match=wanted.format(4)):
        sampler.sample(policy, policy.encode([Prompt("a")]), Progress(4, 9), Streams(0, 4))


def test_a_draw_that_is_no_branching_is_refused():
    wanted = r"LaterPlan.draw must return a Branching of 6 denoising steps; at step {} of the run it returned list"
    with pytest.raises(ValueError, match=wanted.format(0)):
        TreeSampler(6, LaterPlan([1, 3], [1, 3]))
    with pytest.raises(ValueError, match=wanted.format(0)):
        LaterPlan([1, 3], [1, 3]).largest_noise(6)
    with pytest.raises(ValueError, match=wanted.format(2)):
        TreeSampler(6, LaterPlan([1, 3])).branching(Progress(2, 9), Streams(0, 2))


def test_a_bound_on_the_noise_of_another_number_of_steps_is_refused():
    class Bounded(FixedPlan):
        def largest_noise(self, steps):
            return (0.0, 0.7, 0.0)

    sampler = TreeSampler(6, Bounded())
    with pytest.raises(ValueError, match=r"Bounded.largest_noise must return 6 etas, one per denoising step; it returned 3"):
        sampler.outline(TinyPolicy((2, 2)))
