"""Replay reproduces the rollout, shares what siblings share, and is cut into pieces without changing a gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import shuffled

from diffalign import Prompt
from diffalign.core import CPS, Edges, FlowSDE, Loss, Progress, Streams, group_log_softmax, micro_batched, replay, replay_log_prob
from diffalign.samplers import Branching, TreeSampler
from diffalign.testing import GivenPlan, TinyPolicy
from diffalign.testing.slow import path_log_prob
from diffalign.testing.strategies import branchings, forests

PROMPTS = [Prompt("a red cube"), Prompt("two blue stars")]
KERNELS = pytest.mark.parametrize("kernel", [CPS("squared"), CPS("mean"), CPS("sum"), FlowSDE("mean"), FlowSDE("sum")], ids=repr)
TREE = Branching((1, 3, 1, 2, 1), (0.0, 0.7, 0.5, 1.0, 0.0))


def roll_out(policy, branching, seed=0, rows=None):
    sampler = TreeSampler(len(branching.children), GivenPlan(branching), rows)
    with torch.no_grad():
        return sampler.sample(policy, policy.encode(PROMPTS), Progress(0, 1), Streams(seed))


def moved(policy, by=0.1):
    """Weights other than those of the rollout."""
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter += by
    return policy


def shared(policy, forest, edges):
    """[K] path log-probs by unique-parent replay."""
    log_prob = replay_log_prob(policy, forest, edges)
    return forest.path_sum(log_prob.new_zeros(len(forest.latents)).index_copy(0, edges.child, log_prob))


def gradient(policy, value):
    """d value / d weights, flat."""
    return torch.cat([part.flatten() for part in torch.autograd.grad(value, list(policy.trainable_parameters().values()))])


@given(forests())
def test_edges_are_the_stochastic_ones_sorted_by_parent(forest):
    edges = Edges.of(forest)
    assert sorted(edges.child.tolist()) == forest.stochastic.tolist()
    assert torch.equal(edges.parent[edges.owner], forest.parent[edges.child])
    assert (edges.owner.diff() >= 0).all()
    assert edges.parent.tolist() == sorted(set(edges.parent.tolist()))
    assert torch.equal(forest.stochastic[edges.row], edges.child)


def test_edges_are_sorted_where_nodes_are_not():
    policy = TinyPolicy((2, 2), dtype=torch.float64)
    forest = shuffled(roll_out(policy, TREE))
    assert (forest.parent[forest.stochastic].diff() < 0).any()
    edges = Edges.of(forest)
    assert (edges.owner.diff() >= 0).all()
    with torch.no_grad():
        again = replay(policy, forest, edges)
    torch.testing.assert_close(again.mean, forest.mean[edges.row], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(again.log_prob(forest.latents[edges.child]), forest.log_prob[edges.child], rtol=1e-10, atol=1e-10)


@given(forests(), st.integers(1, 4))
def test_pieces_of_parents_partition_the_edges(forest, size):
    edges = Edges.of(forest)
    pieces = [edges.below(piece) for piece in torch.arange(len(edges.parent)).split(size)]
    for name in ("child", "parent", "row"):
        parts = [getattr(piece, name) for piece in pieces]
        assert torch.equal(torch.cat(parts) if len(edges.parent) else getattr(edges, name), getattr(edges, name))
    for piece in pieces:
        assert torch.equal(piece.parent[piece.owner], forest.parent[piece.child])


@KERNELS
@given(data=st.data())
def test_replay_at_unchanged_weights_is_the_rollout(kernel, data):
    branching = data.draw(branchings(first=1 if isinstance(kernel, FlowSDE) else 0))
    rows = data.draw(st.sampled_from([1, 3, None]))
    policy = TinyPolicy((2, 2), kernel=kernel)
    forest = roll_out(policy, branching, rows=rows)
    edges = Edges.of(forest)
    with torch.no_grad():
        again = replay(policy, forest, edges)
        log_prob = replay_log_prob(policy, forest, edges)
    deviation = (again.mean - forest.mean[edges.row]).abs() / again.std[:, None, None]
    assert deviation.max() <= 1e-5
    torch.testing.assert_close(log_prob, forest.log_prob[edges.child], rtol=1e-5, atol=1e-5)


@KERNELS
@given(data=st.data())
@settings(max_examples=10)
def test_deduplicated_replay_is_dense_replay_in_values_and_gradients(kernel, data):
    branching = data.draw(branchings(first=1 if isinstance(kernel, FlowSDE) else 0, max_leaves=8))
    policy = TinyPolicy((2, 2), kernel=kernel, dtype=torch.float64)
    forest = roll_out(policy, branching)
    moved(policy)
    weights = torch.linspace(-1, 2, len(forest.leaves), dtype=torch.float64)
    one, other = shared(policy, forest, Edges.of(forest)), path_log_prob(policy, forest)
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    expected = gradient(policy, weights @ other)
    torch.testing.assert_close(gradient(policy, weights @ one), expected, rtol=0, atol=1e-10 * float(expected.norm()))


@KERNELS
def test_deduplicated_replay_is_dense_replay_in_float32(kernel):
    policy = TinyPolicy((2, 2), kernel=kernel)
    forest = roll_out(policy, TREE)
    moved(policy)
    weights = torch.linspace(-1, 2, len(forest.leaves), dtype=torch.float64)
    one, other = shared(policy, forest, Edges.of(forest)), path_log_prob(policy, forest)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    expected = gradient(policy, weights @ other)
    assert (gradient(policy, weights @ one) - expected).norm() <= 1e-5 * expected.norm()


def test_siblings_cost_one_network_row():
    policy = TinyPolicy()
    branching = Branching((1, 1, 3, 3, 3, 1), (0.0, 0.0, 0.7, 0.7, 0.7, 0.0))
    forest = roll_out(policy, branching)
    before = policy.counter.rows, policy.counter.calls
    edges = Edges.of(forest)
    replay(policy, forest, edges)
    assert (policy.counter.rows - before[0], policy.counter.calls - before[1]) == (2 * 13, 1)
    assert len(edges.child) == 2 * 39


def coupled(forest, edges):
    """A loss that couples all leaves of a group, from edge log-probs: the squared residual to a target, weighted by group softmax."""
    target = torch.linspace(0, 1, len(forest.leaves), dtype=torch.float64)

    def loss_of(values):
        log_prob = values["log_prob"]
        path = forest.path_sum(log_prob.new_zeros(len(forest.latents)).index_copy(0, edges.child, log_prob))
        logs = group_log_softmax(path, forest.group)
        value = (logs.exp() * (logs - group_log_softmax(target, forest.group)).square()).sum()
        return Loss(value, {"loss": (value.detach(), torch.tensor(1))})

    return loss_of


@pytest.mark.parametrize("given_first_pass", [False, True])
@pytest.mark.parametrize("rows", [*range(1, 9), 100])
def test_micro_batches_have_the_gradient_of_the_whole(rows, given_first_pass):
    policy = TinyPolicy((2, 2), dtype=torch.float64)
    forest = roll_out(policy, TREE)
    moved(policy)
    edges = Edges.of(forest)
    sizes, grads = [], []

    def evaluate(parents):
        sizes.append(len(parents))
        grads.append(torch.is_grad_enabled())
        return {"log_prob": replay_log_prob(policy, forest, edges.below(parents))}

    count = len(edges.parent)
    whole = coupled(forest, edges)(evaluate(torch.arange(count)))
    expected = gradient(policy, whole.value)
    known = {"log_prob": replay_log_prob(policy, forest, edges).detach()} if given_first_pass else None
    sizes.clear(), grads.clear()
    losses = list(micro_batched(evaluate, count, coupled(forest, edges), rows, known))

    got = sum(gradient(policy, loss.value) for loss in losses)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10 * float(expected.norm()))
    assert max(sizes) <= rows
    pieces = -(-count // rows)
    first_pass = 0 if given_first_pass or pieces == 1 else pieces
    assert grads == [False] * first_pass + [True] * pieces
    reported = [loss.metrics for loss in losses if loss.metrics]
    assert len(reported) == 1
    torch.testing.assert_close(reported[0]["loss"][0], whole.value.detach(), rtol=1e-12, atol=0)


def test_micro_batches_carry_several_values_of_any_shape_and_skip_those_without_influence():
    weight = torch.linspace(0.1, 1, 5, dtype=torch.float64).requires_grad_()

    def evaluate(index):
        return {"square": weight[index].square(), "pair": torch.stack([weight[index], weight[index].exp()], dim=1), "idle": weight[index]}

    def loss_of(values):
        return Loss(values["square"].sum().square() + values["pair"].prod(dim=1).sum().exp())

    (expected,) = torch.autograd.grad(loss_of(evaluate(torch.arange(5))).value, weight)
    pieces = list(micro_batched(evaluate, 5, loss_of, 2))
    assert len(pieces) == 3
    got = sum(torch.autograd.grad(piece.value, weight)[0] for piece in pieces)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_a_loss_is_not_evaluated_before_it_is_asked_for():
    def evaluate(index):
        raise AssertionError

    micro_batched(evaluate, 3, Loss, 1)


@pytest.mark.parametrize("rows", [0, -1])
def test_a_row_budget_without_rows_is_refused(rows):
    with pytest.raises(ValueError, match=rf"rows must be at least 1, or None for all at once; got {rows}"):
        list(micro_batched(lambda index: {}, 3, lambda values: Loss(torch.tensor(0.0)), rows))


def test_a_forest_without_stochastic_edges_is_refused():
    policy = TinyPolicy((2, 2))
    forest = roll_out(policy, Branching((1, 1, 1), (0.0, 0.0, 0.0), 2))
    with pytest.raises(ValueError, match=r"replay needs stochastic edges, but there is none here.* Take TreeSampler or ChainSampler"):
        replay_log_prob(policy, forest, Edges.of(forest))
