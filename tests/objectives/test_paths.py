"""What objectives over paths share: whose numbers they compare, what a replay costs, and how edges are weighted."""

import math

import attrs
import pytest
import torch
from tiny import PROMOTED, TREE, assert_same, batch_of, gradient, pair, shuffled

from diffalign import Prompt
from diffalign.core import CPS, FlowSDE, Linear, NonFiniteError, Progress, ScoredBatch, Streams
from diffalign.objectives import FlowGRPO, GroupForwardKL, Ratio, RatioNorm, SoftmaxTB
from diffalign.samplers import Branching, TreeSampler
from diffalign.testing import GivenPlan, TinyPolicy


@pytest.mark.parametrize("kernel", [CPS("squared"), CPS("mean"), CPS("sum"), FlowSDE("mean")], ids=repr)
@pytest.mark.parametrize("kind", [SoftmaxTB, GroupForwardKL])
def test_the_rollouts_graph_gives_the_gradient_without_a_network_row(kernel, kind):
    policy, reference = pair(kernel)
    replayed, kept = batch_of(policy), batch_of(policy, keep_graph=True)
    assert torch.equal(replayed.trajectories.latents, kept.trajectories.latents)
    expected = gradient(kind(policy, reference), replayed)
    objective = kind(policy, reference)
    before = policy.counter.rows
    assert_same(gradient(objective, kept), expected)
    assert policy.counter.rows == before


def test_the_samplers_graph_serves_the_first_update_only():
    policy, reference = pair()
    sampler = TreeSampler(steps=4, plan=GivenPlan(TREE), keep_graph=True)
    with torch.no_grad():
        forest = sampler.sample(policy, policy.encode([Prompt("a red cube"), Prompt("two")]), Progress(0, 1), Streams(0))
    assert forest.mean.requires_grad
    assert not forest.latents.requires_grad
    assert not forest.log_prob.requires_grad
    rewards = forest.samples.flatten(1)[:, 0].float()
    batch = ScoredBatch(forest, rewards, {"r": rewards}, 2, Progress(0, 1), Streams(0))
    objective = SoftmaxTB(policy, reference, updates=2)
    gradient(objective, batch, 0)
    before = policy.counter.rows
    gradient(objective, batch, 1)
    assert policy.counter.rows == before + 2 * TREE.replay_rows


@pytest.mark.parametrize("kind", [SoftmaxTB, GroupForwardKL, FlowGRPO])
@pytest.mark.parametrize("rows", [1, 3, None])
def test_the_order_in_which_nodes_are_stored_does_not_matter(kind, rows):
    policy, reference = pair()
    batch = batch_of(policy)
    again = attrs.evolve(batch, trajectories=shuffled(batch.trajectories))
    assert not torch.equal(again.trajectories.latents, batch.trajectories.latents)
    assert_same(gradient(kind(policy, reference, rows=rows), again), gradient(kind(policy, reference), batch))


@pytest.mark.parametrize("rows", [1, 3, None])
def test_in_half_precision_the_old_log_probs_are_those_of_the_first_replay(rows):
    policy = TinyPolicy((2, 2), dtype=torch.bfloat16)
    batch = batch_of(policy)
    drifted = ScoredBatch(  # a rollout whose log-probs are not those of the replay, as other batch shapes give them
        type(batch.trajectories)(**{**vars_of(batch.trajectories), "log_prob": batch.trajectories.log_prob + 0.05}),
        batch.rewards,
        batch.parts,
        2,
        batch.progress,
        batch.streams,
    )
    objective = SoftmaxTB(policy, rows=rows)
    (phase,) = objective.phases()
    losses = list(phase.losses(drifted, 0))
    total, count = losses[0].metrics["ratio/mean"]
    assert float(total / count) == 1.0


def vars_of(trajectories):
    names = ("condition", "sigmas", "latents", "level", "parent", "prompt", "noise_level", "log_prob", "mean")
    return {name: getattr(trajectories, name) for name in names}


def test_level_weights_undo_the_share_of_an_edges_own_leaves():
    """With K = 9 leaves in a 3 x 3 tree: 1 / (1 - 3 / 9) above, 1 / (1 - 1 / 9) below."""
    policy, reference = pair()
    batch = batch_of(policy)
    objective = SoftmaxTB(policy, reference, level_weights=True)
    seen = []
    inner = objective._replay
    objective._replay = lambda batch, update, rows, loss_of: inner(
        batch, update, rows, lambda paths: (seen.append(paths), loss_of(paths))[1]
    )
    weighted = gradient(objective, batch)
    (paths,) = seen
    level = batch.trajectories.level[paths.edges.child]
    expected = torch.where(level == 2, 1 / (1 - 3 / 9), 1 / (1 - 1 / 9))
    torch.testing.assert_close(paths.level_weights(), expected)
    assert not torch.allclose(weighted, gradient(SoftmaxTB(policy, reference), batch))


def test_centring_by_root_takes_out_a_constant_of_each_root():
    policy, reference = pair()
    batch = batch_of(policy, PROMOTED)
    _, root = batch.trajectories.roots.unique(return_inverse=True)
    shifted = ScoredBatch(
        batch.trajectories,
        batch.rewards + torch.tensor([0.0, 3.0, -1.0, 2.0, 0.5, 7.0])[root],
        {},
        2,
        batch.progress,
        batch.streams,
    )
    by_root, by_group = (SoftmaxTB(policy, reference, center=center) for center in ("root", "group"))
    assert_same(gradient(by_root, shifted), gradient(by_root, batch), tolerance=1e-6)
    assert float((gradient(by_group, shifted) - gradient(by_group, batch)).norm()) > 0.1
    with pytest.raises(ValueError, match="at least 2 samples of each root"):
        gradient(by_root, batch_of(policy, Branching((1, 1, 1), (0.0, 0.7, 0.0), roots=3)))


@pytest.mark.parametrize("kind", [SoftmaxTB, GroupForwardKL])
def test_the_constraint_pulls_towards_the_reference(kind):
    policy, reference = pair()
    batch = batch_of(policy)
    free, bound = (kind(policy, reference if weight else None, measure="path", reference_weight=weight) for weight in (0.0, 5.0))
    extra = gradient(bound, batch) - gradient(free, batch)
    there = dict(reference.named_parameters())
    back = torch.cat([(there[name] - mine).flatten() for name, mine in policy.trainable_parameters().items()])
    assert float(extra @ back) < 0  # a step against the gradient leads back
    assert_same(gradient(kind(policy, reference, measure="path", reference_weight=10.0), batch) - gradient(free, batch), 2 * extra)


@pytest.mark.parametrize("kind", [SoftmaxTB, GroupForwardKL])
def test_a_schedule_that_turns_the_constraint_around_is_refused_at_that_step(kind):
    policy, reference = pair()
    falling = kind(policy, reference, reference_weight=Linear(2.0, -1.0, 3))
    batch = batch_of(policy)
    assert float(gradient(falling, attrs.evolve(batch, progress=Progress(2, 4))).norm()) > 0
    message = rf"^{kind.__name__}\.reference_weight at step 3 must be at least 0 and finite: .*; got -1$"
    with pytest.raises(ValueError, match=message):
        gradient(falling, attrs.evolve(batch, progress=Progress(3, 4)))


@pytest.mark.parametrize("kind", [SoftmaxTB, GroupForwardKL])
@pytest.mark.parametrize("rows", [1, 3, None])
def test_gradients_with_every_option_do_not_depend_on_the_row_budget(kind, rows):
    options = {"reference_weight": 2.0, "level_weights": True}
    policy, reference = pair()
    batch = batch_of(policy)
    assert_same(gradient(kind(policy, reference, rows=rows, **options), batch), gradient(kind(policy, reference, **options), batch))


@pytest.mark.parametrize("kind", [SoftmaxTB, GroupForwardKL])
def test_log_probs_that_are_not_finite_are_an_error_with_an_address(kind):
    policy, reference = pair()
    batch = batch_of(policy)
    objective = kind(policy, reference)
    with torch.no_grad():
        next(iter(reference.own_parameters().values())).fill_(math.nan)
    with pytest.raises(NonFiniteError, match=r"log-prob under the reference is nan at level 2 .*'a red cube'"):
        gradient(objective, batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta must be positive"),
        ({"measure": "path", "reference": True}, "has no use with measure 'path'"),
    ],
)
@pytest.mark.parametrize("kind", [SoftmaxTB, GroupForwardKL])
def test_settings_that_make_no_sense_are_refused(kind, options, message):
    policy, reference = pair()
    with pytest.raises(ValueError, match=message):
        kind(policy, **{**options, **({"reference": reference} if "reference" in options else {})})


@pytest.mark.parametrize(
    "options",
    [{"clip": 0.1}, {"clip": None}, {"center": "root"}, {"center": "none"}, {"ratio": Ratio(limit=1.0)}, {"ratio_norm": RatioNorm()}],
)
def test_the_squared_loss_refuses_settings_of_the_surrogate(options):
    (name,) = options
    with pytest.raises(
        ValueError, match=rf"^SoftmaxTB\.{name} has no use with loss 'squared', .*; leave it out, or take loss 'surrogate'$"
    ):
        SoftmaxTB(pair()[0], loss="squared", **options)
    SoftmaxTB(pair()[0], loss="squared", clip=0.2, center="group", ratio=Ratio(), ratio_norm=None)  # what they are anyway


def test_several_updates_need_a_ratio_that_a_summed_density_has():
    policy, _ = pair(CPS("sum"))
    with pytest.raises(ValueError, match="many nats"):
        SoftmaxTB(policy, updates=2)
    SoftmaxTB(policy, updates=2, ratio=Ratio(per_dimension=True))
    SoftmaxTB(policy, updates=2, loss="squared")
