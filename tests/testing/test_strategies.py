"""The strategies draw what they promise, and cover the cases that matter."""

import importlib
import sys

import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

from diffalign.core import ROOT, Edges, replay_log_prob
from diffalign.objectives import AWM, CRD, DGPO, RAM, DiffusionNFT, FlowGRPO, SoftmaxTB
from diffalign.testing import TinyPolicy, strategies
from diffalign.testing.strategies import branchings, forests, reward_groups, scored_batches


@given(st.integers(0, 1), st.booleans(), st.data())
def test_branchings_keep_to_their_arguments(first, comparable, data):
    branching = data.draw(branchings(max_leaves=8, first=first, comparable=comparable))
    assert 1 <= branching.leaves <= 8
    assert not any(branching.noise_levels[:first])
    assert branching.noise_levels[-1] == 0
    assert any(branching.noise_levels)
    assert not comparable or branching.leaves > 1


@given(forests(comparable=True))
def test_comparable_forests_have_noise_and_two_leaves_for_every_prompt(forest):
    counts = [int((forest.group == prompt).sum()) for prompt in range(len(forest.condition))]
    assert min(counts) >= 2
    assert len(forest.stochastic) > 0
    assert (forest.level[forest.stochastic] == forest.level[forest.parent[forest.stochastic]] + 1).all()


@given(scored_batches())
def test_scored_batches_fit_together(batch):
    leaves = len(batch.trajectories.leaves)
    assert batch.rewards.shape == (leaves,)
    assert all(values.shape == (leaves,) for values in batch.parts.values())
    assert batch.groups == len(batch.trajectories.condition)
    assert batch.streams.step == batch.progress.step < batch.progress.total


@given(forests(min_steps=4, max_steps=5), forests(min_steps=8))
def test_forests_have_as_many_steps_as_asked(some, more):
    assert len(some.sigmas) - 1 in (4, 5)
    assert len(more.sigmas) - 1 == 8


@pytest.mark.parametrize("objective", [DGPO, AWM, CRD, RAM, DiffusionNFT, SoftmaxTB, FlowGRPO])
@settings(max_examples=5)
@given(batch=scored_batches())
def test_objectives_with_their_defaults_accept_the_batches(objective, batch):
    made = objective(TinyPolicy((2,)))
    assert [loss for phase in made.phases() for loss in phase.losses(batch, 0)]


@given(forests(comparable=True))
def test_forests_can_be_replayed_by_a_small_policy(forest):
    policy, edges = TinyPolicy((2,)), Edges.of(forest)
    assert replay_log_prob(policy, forest, edges).shape == edges.child.shape
    assert torch.equal(policy.encode(forest.condition.prompts).tensors["embedding"], forest.condition.tensors["embedding"])


@pytest.mark.parametrize(
    ("strategy", "wanted"),
    [
        (branchings(stochastic=False), lambda branching: not any(branching.noise_levels)),
        (branchings(), lambda branching: branching.leaves == 1),
        (branchings(), lambda branching: branching.roots > 1 and max(branching.children) > 1),
        (forests(), lambda forest: bool((forest.paths == ROOT).any())),
        (forests(), lambda forest: len(forest.stochastic) == 0),
        (forests(), lambda forest: len(forest.condition) > 1 and len(set(forest.group.bincount().tolist())) > 1),
        (reward_groups(), lambda groups: bool((groups[1].diff() < 0).any())),
        (reward_groups(), lambda groups: len(groups[0]) == 1),
        (scored_batches(), lambda batch: batch.progress.reward is None),
    ],
)
def test_what_tends_to_break_parts_is_drawn(strategy, wanted):
    find(strategy, wanted, settings=settings(max_examples=500, derandomize=True, database=None, phases=[Phase.generate]))


def test_without_hypothesis_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    monkeypatch.delitem(sys.modules, strategies.__name__)
    with pytest.raises(ImportError, match=r"diffalign.testing.strategies needs hypothesis: pip install 'diffalign\[testing\]'"):
        importlib.import_module(strategies.__name__)
