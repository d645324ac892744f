"""What an update adds to what was there before it: numbers of each edge, and nothing as large as latents that outlives its piece."""

import gc
import weakref

import pytest
import torch

from diffalign import Prompt
from diffalign.core import CPS, Edges, Loss, Progress, ScoredBatch, Streams, micro_batched, replay
from diffalign.costs.live import LiveBytes
from diffalign.objectives import FlowGRPO, GroupForwardKL, SoftmaxTB
from diffalign.samplers import Branching, roll_out
from diffalign.testing import TinyPolicy

SHAPE = (4, 32, 32)
LATENT = 4 * 32 * 32 * 4
"""Bytes of one state."""
ROWS = 2
"""Divides the 4 rows of the smaller tree, so that its last piece is a whole one beside the gradients, as the larger tree's are."""
OBJECTIVES = {
    "relative": lambda policy, reference: SoftmaxTB(policy, reference, updates=2, rows=ROWS),
    "squared": lambda policy, reference: SoftmaxTB(policy, reference, loss="squared", reference_weight=0.1, level_weights=True, rows=ROWS),
    "release": lambda policy, reference: SoftmaxTB.release_compatible(policy, updates=2, rows=ROWS),
    "forward": lambda policy, reference: GroupForwardKL(policy, reference, rows=ROWS),
    "branches, guarded": lambda policy, reference: FlowGRPO(policy, kl=0.0, ratio_norm=True, rows=ROWS),
    "branches, reference in the reward": lambda policy, reference: FlowGRPO(policy, reference, kl_in="reward", rows=ROWS),
}


def batch_of(policy, levels):
    """A tree of 3 children at each of some levels, and a deterministic last step."""
    tree = Branching((3,) * levels + (1,), (0.7,) * levels + (0.0,))
    with torch.no_grad():
        forest = roll_out(policy, policy.encode([Prompt("a red cube")]), tree, Streams(0), rows=9)
    assert len(forest.leaves) == 3**levels
    rewards = torch.linspace(0, 1, len(forest.leaves))
    return ScoredBatch(forest, rewards, {"r": rewards}, 1, Progress(2, 10), Streams(0))


def peak(make, levels):
    """Of the updates, above what was there before."""
    policy = TinyPolicy(SHAPE, kernel=CPS("mean"), hidden=4)
    reference = policy.fork()
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter += 0.01
    batch = batch_of(policy, levels)
    objective = make(policy, reference)
    (phase,) = objective.phases()
    gc.collect()
    gc.disable()  # cycles would be freed whenever
    try:
        with LiveBytes() as live:
            for update in range(phase.repeats):
                for loss in phase.losses(batch, update):
                    loss.value.backward()
    finally:
        gc.enable()
    return live.peak


@pytest.mark.parametrize("name", OBJECTIVES)
def test_more_leaves_cost_an_update_numbers_alone(name):
    few, many = peak(OBJECTIVES[name], 2), peak(OBJECTIVES[name], 4)
    assert few > ROWS * 3 * LATENT, "a piece has its edges"
    assert 0 < many - few < LATENT, "72 leaves and 108 edges more take less than a single state would"
    assert many - few < 256 * 72


def test_the_means_of_a_reference_are_kept_once_for_siblings():
    """The divergence in Flow-GRPO's loss needs them in every pass: a third of what the edges would take, as the class says."""
    make = lambda policy, reference: FlowGRPO(policy, reference, kl=0.1, rows=ROWS)  # noqa: E731
    parents = (1 + 3 + 9 + 27) - (1 + 3)
    grown = peak(make, 4) - peak(make, 2)
    assert parents * LATENT <= grown < 2 * parents * LATENT + LATENT  # joined from pieces: twice for a moment
    policy = TinyPolicy((2, 2))
    objective = make(policy, policy.fork())
    list(objective.phases()[0].losses(batch_of(policy, 2), 0))
    held = weakref.ref(objective._replay._known.reference.steps.mean)
    objective.after_step()
    assert held() is None, "they do not outlive their step"


def test_a_loss_that_keeps_the_means_of_all_edges_would_be_seen():
    def kept(levels):
        policy = TinyPolicy(SHAPE, hidden=4)
        batch = batch_of(policy, levels)
        forest, edges = batch.trajectories, Edges.of(batch.trajectories)
        with LiveBytes() as live:
            means = lambda parents: {"mean": replay(policy, forest, edges.below(parents)).mean}  # noqa: E731
            for loss in micro_batched(means, len(edges.parent), lambda values: Loss(values["mean"].sum()), ROWS):
                loss.value.backward()
        return live.peak

    assert kept(4) - kept(2) > 108 * LATENT


def test_live_bytes_are_those_of_new_storages():
    before = torch.zeros(1000)
    with LiveBytes() as live:
        views = before[10:], before.view(10, 100).t(), before.detach()
        assert live.now == live.peak == 0
        kept = before + 1
        torch.mul(before, 2, out=kept)
        assert live.now == live.peak == 4000
        double = kept.double()
        assert live.now == live.peak == 12000
        listed = torch.tensor([1.0, 2.0])
        assert live.now == 12008
        part = double[:2]
        del double
        assert live.now == 12008, "a view keeps its storage"
        del part, listed
        assert live.now == 4000
        assert live.peak == 12008
    del views, kept
    assert live.now == 0
