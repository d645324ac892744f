"""Flow-GRPO on chains and trees: its formula, its identity with Softmax-TB, what it may depend on."""

import attrs
import pytest
import torch
from chosen import assert_gradient_is_of_the_whole, assert_standardised
from tiny import PROMOTED, TREE, assert_same, batch_of, gradient, pair

from diffalign.core import CPS, ROOT, Edges, FlowSDE, Gaussian, group_mean, replay
from diffalign.objectives import FlowGRPO, SoftmaxTB
from diffalign.objectives.path_losses import gaussian_kl
from diffalign.samplers import Branching, ChainSampler
from diffalign.testing.slow import path_log_prob

CHAINS = ChainSampler(5, samples=4).branching()
WINDOW = ChainSampler(5, samples=4, window=(2, 4)).branching()  # MixGRPO
UNEVEN = Branching((1, 3, 1, 2, 1), (0.0, 0.7, 0.5, 1.0, 0.0))
FORESTS = pytest.mark.parametrize(
    "branching", [CHAINS, WINDOW, TREE, PROMOTED, UNEVEN], ids=["chains", "window", "tree", "roots", "uneven"]
)
KERNELS = pytest.mark.parametrize("kernel", [CPS("squared"), CPS("mean"), CPS("sum"), FlowSDE("mean"), FlowSDE("sum")], ids=repr)


def slowly(policy, reference, batch, kl=0.0, clip=None, standardize=True):
    """The loss by its words: one leaf and one edge at a time."""
    forest = batch.trajectories
    rewards, group = batch.rewards.double(), forest.group
    total = 0.0
    for prompt in group.unique().tolist():
        mine = rewards[group == prompt]
        advantage = mine - mine.mean()
        if standardize:
            advantage = advantage / mine.std(correction=0)
        of_leaf = dict(zip(forest.leaves[group == prompt].tolist(), advantage.tolist(), strict=True))

        def leaves_below(node, of_leaf=of_leaf):
            inside = [leaf for leaf in of_leaf if node in forest.paths[forest.leaves.tolist().index(leaf)].tolist()]
            return sum(of_leaf[leaf] for leaf in inside) / len(inside)

        for leaf in of_leaf:
            child = leaf
            while int(forest.parent[child]) != ROOT:
                parent = int(forest.parent[child])
                if forest.noise_level[child] > 0:
                    level = int(forest.level[parent])
                    arguments = (
                        forest.latents[parent][None],
                        forest.sigmas[level][None],
                        forest.sigmas[level + 1][None],
                        forest.condition.select(forest.prompt[parent][None]),
                        forest.noise_level[child][None],
                    )
                    step = policy.transition(*arguments)
                    ratio = (step.log_prob(forest.latents[child][None])[0] - forest.log_prob[child]).exp()
                    mean = leaves_below(child)
                    inside = ratio if clip is None else ratio.clamp(1 - clip, 1 + clip)
                    total = total + torch.maximum(-mean * ratio, -mean * inside) / len(of_leaf)
                    if kl:
                        with torch.no_grad():
                            other = reference.transition(*arguments)
                        total = total + kl * gaussian_kl(step, other)[0] / len(of_leaf)
                child = parent
    return total / batch.groups


def derivative(policy, value):
    return torch.cat([part.flatten() for part in torch.autograd.grad(value, list(policy.trainable_parameters().values()))])


@FORESTS
@pytest.mark.parametrize("kernel", [CPS("mean"), FlowSDE("sum")], ids=repr)
def test_its_gradient_is_that_of_its_formula(kernel, branching):
    policy, reference = pair(kernel)
    batch = batch_of(policy, branching)
    assert_same(gradient(FlowGRPO(policy, kl=0.0), batch), derivative(policy, slowly(policy, None, batch)))
    expected = derivative(policy, slowly(policy, reference, batch, kl=0.7, standardize=False))
    assert_same(gradient(FlowGRPO(policy, reference, kl=0.7, standardize=False), batch), expected)


def test_a_second_update_weighs_each_step_by_its_ratio_and_clips_it():
    policy, reference = pair(CPS("mean"))
    batch = batch_of(policy, CHAINS)
    objective = FlowGRPO(policy, reference, kl=0.5, clip=0.02, updates=2)
    gradient(objective, batch, 0)
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter += 0.05
    value = slowly(policy, reference, batch, kl=0.5, clip=0.02)
    (phase,) = objective.phases()
    (loss,) = phase.losses(batch, 1)
    torch.testing.assert_close(loss.value, value, rtol=1e-10, atol=0)
    clipped, count = loss.metrics["ratio/clipped"]
    assert 0 < float(clipped) < float(count)
    assert_same(gradient(objective, batch, 1), derivative(policy, value))


@pytest.mark.parametrize("branching", [CHAINS, TREE], ids=["chains", "tree"])
@pytest.mark.parametrize(("kernel", "unit"), [(CPS("mean"), 1.0), (FlowSDE("sum"), 1 / 4)], ids=["mean", "sum"])
def test_the_normalised_ratio_takes_out_the_noise_of_a_step(kernel, unit, branching):
    """Each step then is weighted by its standard deviation n (by n / D with "sum"), and its ratio is exp(<z (mu - mu_old)>)."""
    policy, _ = pair(kernel)
    batch = batch_of(policy, branching)
    forest, edges = batch.trajectories, Edges.of(batch.trajectories)
    rewards = batch.rewards.double()
    advantage = forest.node_mean(rewards - group_mean(rewards, forest.group))[edges.child]
    below = torch.tensor([int((forest.paths == node).sum()) for node in edges.child.tolist()])
    share = below / torch.bincount(forest.group)[forest.prompt[edges.child]].double() / batch.groups
    step = replay(policy, forest, edges)
    log_prob = step.log_prob(forest.latents[edges.child])
    objective = FlowGRPO(policy, kl=0.0, standardize=False, ratio_norm=True, clip=None, updates=2)
    assert_same(gradient(objective, batch), derivative(policy, -(share * advantage * unit * step.std * log_prob).sum()))

    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter += 0.05
        old = forest.mean[edges.row]
        noise = (forest.latents[edges.child] - old) / step.std[:, None, None]
        ratio = (noise * (replay(policy, forest, edges).mean - old)).flatten(1).mean(dim=1).exp()
        assert float((ratio - 1).abs().max()) > 1e-3
    (phase,) = objective.phases()
    (loss,) = phase.losses(batch, 1)
    torch.testing.assert_close(loss.value.detach(), -(share * advantage * ratio).sum(), rtol=1e-9, atol=1e-15)


@FORESTS
@KERNELS
def test_with_the_log_ratio_in_the_reward_it_is_centred_relative_softmax_tb(kernel, branching):
    policy, reference = pair(kernel)
    batch = batch_of(policy, branching)
    expected = gradient(SoftmaxTB(policy, reference, beta=3.0), batch)
    tempered = attrs.evolve(batch, rewards=3.0 * batch.rewards.double())
    assert_same(gradient(FlowGRPO(policy, reference, kl=1.0, kl_in="reward", standardize=False), tempered), expected)
    assert_same(3.0 * gradient(FlowGRPO(policy, reference, kl=1 / 3, kl_in="reward", standardize=False), batch), expected)


@FORESTS
@pytest.mark.parametrize(
    "options", [{"kl": 0.3}, {"kl": 0.3, "kl_in": "reward"}, {"kl": 0.3, "ratio_norm": True}, {"kl": 0.0, "level_weights": True}], ids=repr
)
def test_the_gradient_is_that_of_the_whole(options, branching):
    policy, reference = pair()
    given_reference = None if options["kl"] == 0 else reference
    assert_gradient_is_of_the_whole(lambda rows: FlowGRPO(policy, given_reference, rows=rows, **options), branching)


@pytest.mark.parametrize("rows", [1, 4])
def test_a_later_update_in_pieces_is_that_of_the_whole(rows):
    policy, reference = pair()
    batch = batch_of(policy)

    def later(rows):
        objective = FlowGRPO(policy, reference, kl=0.3, ratio_norm=True, clip=0.01, updates=2, rows=rows)
        gradient(objective, batch, 0)
        with torch.no_grad():
            for parameter in policy.trainable_parameters().values():
                parameter += 0.05
        found = gradient(objective, batch, 1)
        with torch.no_grad():
            for parameter in policy.trainable_parameters().values():
                parameter -= 0.05
        return found

    assert_same(later(rows), later(None), tolerance=1e-9)


@pytest.mark.parametrize("branching", [CHAINS, TREE], ids=["chains", "tree"])
def test_only_the_order_and_spacing_of_rewards_counts(branching):
    policy, _ = pair()
    assert_standardised(lambda: FlowGRPO(policy, kl=0.0), branching)


def test_without_standardising_a_shift_changes_nothing_and_a_scale_scales():
    policy, _ = pair()
    batch = batch_of(policy)
    once = gradient(FlowGRPO(policy, kl=0.0, standardize=False), batch)
    scaled = attrs.evolve(batch, rewards=3.0 * batch.rewards.double() - 7.0)
    assert_same(gradient(FlowGRPO(policy, kl=0.0, standardize=False), scaled), 3.0 * once)


def test_the_deviation_of_the_step_takes_the_place_of_the_groups():
    policy, _ = pair()
    batch = batch_of(policy)
    centred = gradient(FlowGRPO(policy, kl=0.0, standardize=False), batch)
    of_step = gradient(FlowGRPO(policy, kl=0.0, deviation="batch"), attrs.evolve(batch, deviation=0.25))
    assert_same(of_step, centred / 0.25)
    by_hand = gradient(FlowGRPO(policy, kl=0.0, deviation="batch"), attrs.evolve(batch, deviation=None))
    assert_same(by_hand, centred / float(batch.rewards.double().std(unbiased=False)))
    assert float((of_step - gradient(FlowGRPO(policy, kl=0.0), batch)).norm()) > 1e-6
    with pytest.raises(ValueError, match="deviation"):
        FlowGRPO(policy, deviation="prompt")


@pytest.mark.parametrize("kl_in", ["loss", "reward"])
def test_at_the_reference_equal_rewards_move_nothing_and_away_from_it_they_pull_back(kl_in):
    policy, reference = pair(CPS("sum"))
    batch = batch_of(policy)
    batch = attrs.evolve(batch, rewards=torch.full_like(batch.rewards, 0.7))
    settings = {"kl": 0.5, "kl_in": kl_in, "standardize": False}
    assert float(gradient(FlowGRPO(policy, **settings), batch).norm()) < 1e-12  # its own reference is the policy as it is
    objective = FlowGRPO(policy, reference, **settings)
    parameters = list(policy.trainable_parameters().values())
    downhill = -gradient(objective, batch)
    back = torch.cat([(r - p).detach().flatten() for p, r in zip(parameters, _own(reference), strict=True)])
    assert float(downhill @ back) > 0


def _own(policy):
    return [parameter for name, parameter in policy.named_parameters() if "lora_" in name]


@pytest.mark.parametrize("branching", [CHAINS, TREE], ids=["chains", "tree"])
def test_a_step_downhill_makes_better_samples_likelier(branching):
    policy, _ = pair(CPS("sum"))
    batch = batch_of(policy, branching)
    forest = batch.trajectories
    before = path_log_prob(policy, forest).detach()
    found, place = gradient(FlowGRPO(policy, kl=0.0), batch), 0
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter -= 1e-4 * found[place : place + parameter.numel()].reshape(parameter.shape)
            place += parameter.numel()
    advantage = batch.rewards.double() - group_mean(batch.rewards.double(), forest.group)
    assert float(advantage @ (path_log_prob(policy, forest).detach() - before)) > 1e-6


@pytest.mark.parametrize("kernel", [CPS("mean"), FlowSDE("sum")], ids=repr)
def test_the_rollouts_graph_serves_the_first_update(kernel):
    policy, reference = pair(kernel)
    objective = FlowGRPO(policy, reference, kl=0.3)
    expected = gradient(objective, batch_of(policy))
    before = policy.counter.rows
    kept = batch_of(policy, keep_graph=True)
    rolled = policy.counter.rows
    assert rolled > before
    assert_same(gradient(objective, kept), expected)
    assert policy.counter.rows == rolled


@pytest.mark.parametrize("density", ["squared", "mean", "sum"])
def test_the_divergence_is_the_mean_log_ratio(density):
    """Over z = +-sqrt(D) e_i, which has the mean and the covariance of unit noise, so quadratics are averaged exactly."""
    generator = torch.Generator().manual_seed(0)
    own, other = (torch.randn(3, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    p = Gaussian(own, torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64), density)
    q = Gaussian(other, torch.tensor([0.5, 0.7, 3.0], dtype=torch.float64), density)
    points = [sign * 2.0 * row.reshape(2, 2) for row in torch.eye(4, dtype=torch.float64) for sign in (1, -1)]
    ratios = [p.log_prob(p.sample(z.expand(3, 2, 2))) - q.log_prob(p.sample(z.expand(3, 2, 2))) for z in points]
    torch.testing.assert_close(gaussian_kl(p, q), torch.stack(ratios).mean(dim=0))
    if density == "sum":
        flat = [torch.distributions.Normal(g.mean.flatten(1), g.std[:, None]) for g in (p, q)]
        torch.testing.assert_close(gaussian_kl(p, q), torch.distributions.kl_divergence(*flat).sum(dim=1))
