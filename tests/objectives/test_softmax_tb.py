"""Softmax-TB on batches: what its gradient is, what it may depend on, what it refuses, and that it teaches."""

import math

import attrs
import pytest
import torch
from hypothesis import given, settings

from diffalign import AlignmentLoop, Prompt
from diffalign.core import CPS, Condition, FlowSDE, Linear, Progress, ScoredBatch, Streams, group_mean, score
from diffalign.objectives import GroupForwardKL, KLBudget, Ratio, SoftmaxTB
from diffalign.objectives.requirements import require_comparable
from diffalign.objectives.terms import softmax_tb
from diffalign.policies import GaussianMixturePolicy
from diffalign.prompts import Prompts
from diffalign.samplers import Branching, DeterministicSampler, FixedPlan, TreeSampler, roll_out
from diffalign.testing import ConstantReward, GivenPlan, TinyPolicy, channel_reward
from diffalign.testing.slow import path_log_prob
from diffalign.testing.strategies import forests, scored_batches

PROMPTS = [Prompt("a red cube"), Prompt("two blue stars"), Prompt("three green disks")]
TREE = Branching((1, 3, 1, 2, 1), (0.0, 0.7, 0.5, 1.0, 0.0))
KERNELS = pytest.mark.parametrize("kernel", [CPS("squared"), CPS("mean"), CPS("sum"), FlowSDE("mean"), FlowSDE("sum")], ids=repr)
EXACT = 1e-10


def moved(policy, by):
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter += by
    return policy


def pair(kernel=None, dtype=torch.float64):
    """A policy that has moved away from its reference."""
    policy = TinyPolicy((2, 2), kernel=kernel, dtype=dtype)
    reference = policy.fork()
    return moved(policy, 0.15), reference


def batch_of(policy, branching=TREE, prompts=PROMPTS, ids=None, streams=None, reward=channel_reward, groups=None):
    condition = policy.encode(prompts)
    if ids is not None:
        condition = Condition(condition.prompts, torch.tensor(ids), condition.tensors)
    streams = streams or Streams(1, 2)
    with torch.no_grad():
        forest = roll_out(policy, condition, branching, streams)
    texts = [prompts[index] for index in forest.group.tolist()]
    parts = score({"r": reward}, policy.decode(forest.samples), texts)
    return ScoredBatch(forest, parts["r"], parts, groups or len(prompts), Progress(2, 10), streams)


def losses(objective, batch, update=0):
    (phase,) = objective.phases()
    return list(phase.losses(batch, update))


def flat_gradient(policy, value):
    return torch.cat([part.flatten() for part in torch.autograd.grad(value, list(policy.trainable_parameters().values()))])


def gradient(objective, batch, update=0):
    return sum(flat_gradient(objective.policy, loss.value) for loss in losses(objective, batch, update))


def assert_same(got, expected, tolerance=EXACT):
    assert float(expected.norm()) > 1e-6
    assert float((got - expected).norm()) <= tolerance * float(expected.norm())


def drift_of(policy, reference, batch):
    """[K] the log-ratio of each path in nats."""
    with torch.no_grad():
        log_ref = path_log_prob(reference, batch.trajectories, nats=True)
    return path_log_prob(policy, batch.trajectories, nats=True) - log_ref


def mean_over_groups(per_sample, batch):
    """Mean over the samples of a group, then over groups: groups are equally large here."""
    assert len(set(torch.bincount(batch.trajectories.group).tolist())) == 1
    return per_sample.mean()


@KERNELS
def test_on_policy_the_centred_gradient_is_half_that_of_vargrad_and_that_of_a_policy_gradient(kernel):
    """Temperatures are nats in every convention; the gradient is that of the kernel's log-density."""
    policy, reference = pair(kernel)
    batch = batch_of(policy)
    group, beta = batch.trajectories.group, 3.0
    got = gradient(SoftmaxTB(policy, reference, beta=beta), batch)

    gap = drift_of(policy, reference, batch) - beta * batch.rewards.double()
    if kernel.density != "squared":  # whose edges weigh differently in the gradient
        unit = 4 if kernel.density == "mean" else 1  # 2 x 2 latent dimensions
        variance = mean_over_groups((gap - group_mean(gap, group)).square(), batch)
        assert_same(got, flat_gradient(policy, variance) / 2 / unit)

    reward = -gap.detach()
    log_prob = path_log_prob(policy, batch.trajectories)
    surrogate = -mean_over_groups((reward - group_mean(reward, group)) * log_prob, batch)
    assert_same(got, flat_gradient(policy, surrogate))


@pytest.mark.parametrize("objective", [SoftmaxTB, GroupForwardKL])
def test_beta_means_the_same_in_every_convention(objective):
    """The same trajectories and weights: equal targets, advantages and distances, whatever the unit of the log-density."""
    seen = []
    for density in ("sum", "mean", "squared"):
        policy, reference = pair(CPS(density))
        (loss,) = losses(objective(policy, reference, beta=3.0), batch_of(policy))
        names = ("ess/target", "ess/policy", "log_ratio/reference", "log_ratio/spread", "reference/felt", "advantage/std")
        seen.append({name: float(loss.metrics[name][0]) for name in names if name in loss.metrics})
    assert len(seen[0]) >= 5
    assert abs(seen[0]["log_ratio/reference"]) > 0.1
    for other in seen[1:]:
        assert other == pytest.approx(seen[0], rel=1e-9)


@KERNELS
def test_without_centring_only_the_group_mean_is_added(kernel):
    policy, reference = pair(kernel)
    batch = batch_of(policy)
    objective = SoftmaxTB(policy, reference, beta=3.0, center="none")
    log_prob = path_log_prob(policy, batch.trajectories)
    ratio = drift_of(policy, reference, batch).detach()
    group = batch.trajectories.group
    logs = torch.cat([ratio[group == g].log_softmax(0) - (3.0 * batch.rewards.double()[group == g]).log_softmax(0) for g in range(3)])
    assert_same(gradient(objective, batch), flat_gradient(policy, mean_over_groups(logs * log_prob, batch)))


@KERNELS
def test_the_squared_loss_has_the_gradient_of_its_formula(kernel):
    policy, reference = pair(kernel)
    batch = batch_of(policy)
    objective = SoftmaxTB(policy, reference, beta=3.0, loss="squared")
    ratio = drift_of(policy, reference, batch)
    group, rewards = batch.trajectories.group, batch.rewards.double()
    total = sum((ratio[group == g].log_softmax(0) - (3.0 * rewards[group == g]).log_softmax(0)).square().sum() for g in range(3))
    (loss,) = losses(objective, batch)
    torch.testing.assert_close(loss.value, total / 3, rtol=EXACT, atol=0)
    assert_same(gradient(objective, batch), flat_gradient(policy, total / 3))


class Mirrored:
    """Noise in which siblings come in pairs of opposite sign, and which is as large on every branch of a level."""

    def normals(self, shape, name, prompt_ids, node_ids):
        rows = []
        for prompt, node in zip(prompt_ids, node_ids, strict=True):
            level, place = node >> 32, node & 0xFFFFFFFF
            noise = Streams(7).normal(shape, name, prompt, level)
            rows.append(-noise if level and place % 2 else noise)
        return torch.stack(rows)


@KERNELS
@pytest.mark.parametrize("center", ["group", "none"])
def test_the_path_measure_is_a_policy_gradient_that_does_not_see_the_path(kernel, center):
    """E[log p(tau) grad log p(tau)] = 0 by symmetry of the noise; with mirrored noise it is zero in every batch."""
    policy, reference = pair(kernel)
    branching = Branching((1, 2, 1, 2, 1), (0.0, 0.7, 0.0, 1.0, 0.0))
    batch = batch_of(policy, branching, streams=Mirrored())
    plain = flat_gradient(policy, mean_over_groups(-3.0 * batch.rewards.double() * path_log_prob(policy, batch.trajectories), batch))
    assert_same(gradient(SoftmaxTB(policy, beta=3.0, measure="path", center=center), batch), plain, tolerance=1e-8)
    relative = gradient(SoftmaxTB(policy, reference, beta=3.0, center=center), batch)
    assert (relative - plain).norm() > 1e-3 * plain.norm()


def objectives(policy, reference, **options):
    return [SoftmaxTB(policy, reference, loss=loss, **options) for loss in ("surrogate", "squared")]


def test_a_shift_of_a_groups_rewards_changes_no_gradient():
    policy, reference = pair()
    batch = batch_of(policy)
    shifted = attrs.evolve(batch, rewards=batch.rewards.double() + 5.0 * batch.trajectories.group)
    for objective in objectives(policy, reference, beta=2.0):
        assert_same(gradient(objective, shifted), gradient(objective, attrs.evolve(batch, rewards=batch.rewards.double())))


def test_temperature_and_reward_act_through_their_product_alone():
    policy, reference = pair()
    batch = batch_of(policy)
    halved = attrs.evolve(batch, rewards=batch.rewards.double() / 2)
    for one, other in zip(objectives(policy, reference, beta=2.0), objectives(policy, reference, beta=4.0), strict=True):
        assert_same(gradient(other, halved), gradient(one, batch))


def test_rewards_that_the_policy_already_matches_move_nothing():
    policy, reference = pair()
    batch = batch_of(policy)
    ratio = drift_of(policy, reference, batch).detach()
    matched = attrs.evolve(batch, rewards=ratio / 2.0 + batch.trajectories.group)
    for objective in objectives(policy, reference, beta=2.0):
        start = gradient(objective, batch).norm()
        assert gradient(objective, matched).norm() < 1e-10 * start


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 100])
@pytest.mark.parametrize("update", [0, 1])
def test_the_gradient_does_not_depend_on_the_row_budget(rows, update):
    policy, reference = pair()
    batch = batch_of(policy)
    whole = objectives(policy, reference, updates=2)
    pieces = objectives(policy, reference, updates=2, rows=rows)
    for one, other in zip(whole, pieces, strict=True):
        expected, got = gradient(one, batch), gradient(other, batch)
        if update:
            moved(policy, 0.05)
            expected, got = gradient(one, batch, 1), gradient(other, batch, 1)
            moved(policy, -0.05)
        assert_same(got, expected)


@pytest.mark.parametrize("rows", [1, 4, 7])
def test_in_float32_the_first_pass_of_the_first_update_is_free(rows):
    policy, reference = pair(dtype=torch.float32)
    batch = batch_of(policy)
    expected = gradient(SoftmaxTB(policy, reference, updates=2), batch)
    objective = SoftmaxTB(policy, reference, updates=2, rows=rows)
    parents = 3 * TREE.replay_rows
    before = policy.counter.rows
    got = gradient(objective, batch)
    assert policy.counter.rows - before == parents
    assert_same(got, expected, tolerance=1e-5)
    before = policy.counter.rows, reference.counter.rows
    losses(objective, batch, 1)
    assert (policy.counter.rows - before[0], reference.counter.rows - before[1]) == (2 * parents, 0)


@pytest.mark.parametrize("rows", [None, 4])
def test_the_gradient_is_the_mean_of_those_of_the_prompts_in_any_order(rows):
    policy, reference = pair()
    for objective in objectives(policy, reference, rows=rows):
        together = gradient(objective, batch_of(policy))
        alone = [gradient(objective, batch_of(policy, prompts=[PROMPTS[index]], ids=[index])) for index in range(3)]
        assert_same(together, sum(alone) / 3)
        order = [2, 0, 1]
        assert_same(gradient(objective, batch_of(policy, prompts=[PROMPTS[index] for index in order], ids=order)), together)


def test_the_global_number_of_groups_is_the_denominator():
    policy, reference = pair()
    for objective in objectives(policy, reference):
        assert_same(gradient(objective, batch_of(policy, groups=12)), gradient(objective, batch_of(policy)) / 4)


def test_a_second_update_weighs_by_the_ratio_to_the_rollout_and_clips_it():
    policy, reference = pair(CPS("sum"))
    batch = batch_of(policy)
    objective = SoftmaxTB(policy, reference, beta=3.0, clip=0.2, ratio=Ratio(per_dimension=True), updates=2)
    losses(objective, batch, 0)
    moved(policy, 0.1)
    group = batch.trajectories.group
    log_prob = path_log_prob(policy, batch.trajectories)
    with torch.no_grad():
        gap = log_prob - path_log_prob(reference, batch.trajectories) - 3.0 * batch.rewards.double()
        advantage = group_mean(gap, group) - gap
    ratio = ((log_prob - batch.trajectories.path_sum(batch.trajectories.log_prob)) / 4).exp()  # of 2 x 2 latent dimensions
    clipped = (ratio - 1).abs() > 0.2
    assert 0 < clipped.sum() < len(clipped)
    expected = mean_over_groups(torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2)), batch)
    (loss,) = losses(objective, batch, 1)
    torch.testing.assert_close(loss.value, expected, rtol=EXACT, atol=0)
    assert loss.metrics["ratio/clipped"][0] == clipped.sum()
    assert_same(gradient(objective, batch, 1), flat_gradient(policy, expected))


def test_a_later_update_of_another_batch_is_refused():
    policy, reference = pair(CPS("mean"))
    first, second = batch_of(policy), batch_of(policy)
    objective = SoftmaxTB(policy, reference, updates=2)
    with pytest.raises(RuntimeError, match="update 1 of a batch needs the numbers of update 0 of the same batch"):
        losses(objective, first, 1)
    losses(objective, first, 0)
    losses(objective, attrs.evolve(first, rewards=first.rewards + 1), 1)  # scored again: its paths are those that are known
    with pytest.raises(RuntimeError, match="update 1 of a batch needs the numbers of update 0 of the same batch"):
        losses(objective, second, 1)


def test_without_clip_no_ratio_is_clipped():
    policy, reference = pair(CPS("sum"))
    batch = batch_of(policy)
    objective = SoftmaxTB(policy, reference, clip=None, ratio=Ratio(per_dimension=True), updates=2)
    losses(objective, batch, 0)
    moved(policy, 0.3)
    log_prob = path_log_prob(policy, batch.trajectories)
    with torch.no_grad():
        gap = log_prob - path_log_prob(reference, batch.trajectories) - 20.0 * batch.rewards.double()
        advantage = group_mean(gap, batch.trajectories.group) - gap
    ratio = ((log_prob - batch.trajectories.path_sum(batch.trajectories.log_prob)) / 4).exp()  # of 2 x 2 latent dimensions
    assert (ratio - 1).abs().max() > 0.5
    (loss,) = losses(objective, batch, 1)
    torch.testing.assert_close(loss.value, mean_over_groups(-advantage * ratio, batch), rtol=EXACT, atol=0)
    assert loss.metrics["ratio/clipped"][0] == 0


def first_group_equal(images, prompts):
    return torch.tensor([0.5 if prompt == PROMPTS[0] else float(image[0]) for prompt, image in zip(prompts, images, strict=True)])


def test_under_path_a_group_without_spread_is_skipped_and_stays_in_the_denominator():
    policy, _ = pair()
    objective = SoftmaxTB(policy, measure="path", beta=2.0)
    got = gradient(objective, batch_of(policy, reward=first_group_equal))
    others = gradient(objective, batch_of(policy, prompts=PROMPTS[1:], ids=[1, 2], reward=first_group_equal))
    assert_same(got, others * 2 / 3)
    (loss,) = losses(objective, batch_of(policy, reward=first_group_equal))
    total, count = loss.metrics["skipped_groups"]
    assert total / count == pytest.approx(1 / 3)


def test_under_relative_a_group_without_spread_pulls_back_to_the_reference():
    policy, reference = pair(CPS("sum"))
    batch = batch_of(policy, reward=ConstantReward(0.7))
    objective = SoftmaxTB(policy, reference)

    def distance():
        with torch.no_grad():
            gap = path_log_prob(policy, batch.trajectories) - path_log_prob(reference, batch.trajectories)
            return (gap - group_mean(gap, batch.trajectories.group)).square().mean()

    start = distance()
    (loss,) = losses(objective, batch)
    assert loss.metrics["skipped_groups"][0] == 0
    loss.value.backward()
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter -= 1e-3 * parameter.grad
    assert distance() < start


@pytest.mark.parametrize("measure", ["relative", "path"])
def test_a_constant_reward_moves_nothing_at_the_reference(measure):
    policy = TinyPolicy((2, 2), dtype=torch.float64)
    batch = batch_of(policy, reward=ConstantReward(0.7))
    assert gradient(SoftmaxTB(policy, measure=measure), batch).norm() < 1e-12


def test_metrics_say_what_happened():
    policy, reference = pair()
    batch = batch_of(policy)
    (loss,) = losses(SoftmaxTB(policy, reference, beta=Linear(1.0, 3.0, 4)), batch)
    means = {name: float(total) / float(count) for name, (total, count) in loss.metrics.items()}
    ratio = drift_of(policy, reference, batch).detach()
    expected = softmax_tb(ratio, 2.0 * batch.rewards.double(), batch.trajectories.group).mean()
    assert means["beta"] == 2.0  # step 2 of 4
    assert means["softmax_tb"] == pytest.approx(float(expected))
    assert means["log_ratio/reference"] == pytest.approx(float(ratio.mean()))
    assert means["loss"] == pytest.approx(float(loss.value.detach()))
    assert means["ratio/mean"] == pytest.approx(1.0)
    assert means["ratio/clipped"] == means["skipped_groups"] == 0
    assert 1 / 6 <= means["ess/target"] <= 1
    assert 1 / 6 <= means["ess/policy"] <= 1
    group, rewards = batch.trajectories.group, 2.0 * batch.rewards.double()
    spread = [torch.stack([values[group == g].std(correction=0) for g in range(3)]).mean() for values in (ratio, rewards)]
    assert means["log_ratio/spread"] == pytest.approx(float(spread[0]))
    assert means["target/spread"] == pytest.approx(float(spread[1]))
    assert means["reference/felt"] == pytest.approx(float(spread[0] / spread[1]))
    (loss,) = losses(SoftmaxTB(policy, measure="path"), batch)
    assert not {"log_ratio/reference", "reference/felt"} & loss.metrics.keys()


@given(scored_batches())
@settings(max_examples=10)
def test_irregular_forests_are_no_special_case(batch):
    policy = TinyPolicy((2,), dtype=torch.float64)
    encoded = policy.encode(batch.trajectories.condition.prompts)
    forest = attrs.evolve(
        batch.trajectories, condition=encoded, sigmas=batch.trajectories.sigmas.double(), latents=batch.trajectories.latents.double()
    )
    batch = attrs.evolve(batch, trajectories=forest)
    old = path_log_prob(policy, forest).detach()
    shift = (old - forest.path_sum(forest.log_prob)).abs().max()
    assert shift > 1e-3  # the stored log-probs are another policy's: every ratio is off-policy
    objective = SoftmaxTB(policy, policy.fork(pristine=True), beta=2.0, loss="squared")
    got = gradient(objective, batch)
    ratio = drift_of(policy, objective.reference, batch)
    group, rewards = forest.group, batch.rewards.double()
    total = 0.0
    for index in group.unique():
        mine = group == index
        residual = ratio[mine].log_softmax(0) - (2.0 * rewards[mine]).log_softmax(0)
        total = total + residual.square().sum()
    expected = flat_gradient(policy, total / batch.groups)
    assert float((got - expected).norm()) <= 1e-9 * max(1.0, float(expected.norm()))


def test_the_reference_is_a_frozen_fork_of_the_policy_as_it_is():
    policy = TinyPolicy()
    objective = SoftmaxTB(policy)
    weights = policy.network.lora_B.weight.clone()
    moved(policy, 1.0)
    assert torch.equal(objective.reference.network.lora_B.weight, weights)
    assert not objective.reference.trainable_parameters()
    assert objective.policies() == {"policy": policy, "reference": objective.reference}
    assert SoftmaxTB(policy, measure="path").policies() == {"policy": policy}
    assert objective.behavior() is policy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "SoftmaxTB.beta must be positive and finite: it is an inverse temperature; got 0"),
        ({"beta": -1}, "SoftmaxTB.beta must be positive and finite: it is an inverse temperature; got -1"),
        ({"beta": math.inf}, "SoftmaxTB.beta must be positive and finite: it is an inverse temperature; got inf"),
        ({"beta": math.nan}, "SoftmaxTB.beta must be positive and finite"),
        ({"beta": KLBudget(5.0), "measure": "path"}, "SoftmaxTB.beta must be a number or a schedule with measure 'path'"),
        ({"clip": 0.0}, "clip"),
        ({"updates": 0}, "updates"),
        ({"rows": 0}, "rows"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SoftmaxTB(TinyPolicy(), **options)


@pytest.mark.parametrize("measure", ["relative", "path"])
@pytest.mark.parametrize("weight", [-1.0, math.inf, math.nan])
@pytest.mark.parametrize("objective", [SoftmaxTB, GroupForwardKL])
def test_a_weight_of_the_reference_that_would_be_no_constraint_is_refused(objective, weight, measure):
    with pytest.raises(ValueError, match=rf"^{objective.__name__}\.reference_weight must be at least 0 and finite: .*; got {weight:g}$"):
        objective(TinyPolicy(), measure=measure, reference_weight=weight)


def test_a_reference_that_could_move_is_refused():
    policy = TinyPolicy()
    with pytest.raises(ValueError, match=r"reference must be frozen: 2 parameters require grad"):
        SoftmaxTB(policy, policy.fork(trainable=True))
    with pytest.raises(ValueError, match=r"reference must be frozen"):
        SoftmaxTB(policy, policy)
    with pytest.raises(ValueError, match=r"SoftmaxTB.reference has no use with measure 'path'"):
        SoftmaxTB(policy, policy.fork(), measure="path")


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (
            DeterministicSampler(4, samples=3),
            "SoftmaxTB needs stochastic steps, but the sampler draws deterministic trajectories alone. Take TreeSampler",
        ),
        (
            TreeSampler(3, GivenPlan(Branching((1, 1, 1), (0.7, 0.7, 0.0)))),
            "SoftmaxTB needs at least 2 samples per prompt to compare; the sampler draws 1. Give the sampler more",
        ),
    ],
)
def test_a_sampler_that_teaches_nothing_is_refused_at_once(sampler, message):
    with pytest.raises(ValueError, match=message):
        AlignmentLoop(SoftmaxTB(TinyPolicy()), sampler, channel_reward, Prompts(PROMPTS, shuffle=False), prompts_per_step=2)


@given(forests(comparable=True))
def test_comparable_forests_pass(forest):
    require_comparable(forest, "Mine")


def test_a_prompt_without_samples_is_not_comparable():
    policy = TinyPolicy()
    forest = batch_of(policy).trajectories
    more = attrs.evolve(forest, condition=policy.encode([*PROMPTS, Prompt("a forgotten one")]))
    with pytest.raises(ValueError, match="Mine needs at least 2 samples per prompt to compare; prompt 'a forgotten one' has 0"):
        require_comparable(more, "Mine")


ANGLES = torch.arange(8) * math.pi / 4
MODES = torch.stack([4 * ANGLES.cos(), 4 * ANGLES.sin()], dim=1)


def even_modes(images, prompts):
    """1 within 1.5 of the modes 0, 2, 4 and 6 of the ring, else 0."""
    distance, nearest = torch.cdist(16 * images[:, :2, 0, 0] - 8, MODES).min(dim=1)
    return ((nearest % 2 == 0) & (distance < 1.5)).float()


def aligned_on_a_ring(measure):
    """Mass on the rewarded modes, and the effective number of modes that hold it, before and after."""
    policy = GaussianMixturePolicy(MODES, scale=0.3, kernel=CPS("sum"))

    def measured():
        with torch.no_grad():
            forest = DeterministicSampler(20, samples=400).sample(policy, policy.encode(PROMPTS[:1]), Progress(0, 1), Streams(99))
            reward = even_modes(policy.decode(forest.samples), None)
        nearest = torch.cdist(forest.samples, MODES).argmin(dim=1)[reward > 0]
        share = torch.bincount(nearest, minlength=8) / len(nearest)
        return float(reward.mean()), math.exp(-float(torch.special.xlogy(share, share).sum()))

    before = measured()
    sampler = TreeSampler(8, FixedPlan((0, 1, 2, 3), branches=2, eta=0.9))
    loop = AlignmentLoop(
        SoftmaxTB(policy, beta=10.0, measure=measure),
        sampler,
        even_modes,
        Prompts(PROMPTS[:1]),
        prompts_per_step=8,
        optimizers={"policy": lambda parameters: torch.optim.Adam(parameters, lr=0.1)},
    )
    loop.run(60)
    return before, measured()


def test_it_raises_the_reward_and_keeps_every_rewarded_mode():
    (mass_before, modes_before), (mass, modes) = aligned_on_a_ring("relative")
    assert mass_before == pytest.approx(0.5, abs=0.1)
    assert modes_before == pytest.approx(4, abs=0.1)
    assert mass > 0.85
    assert modes > 3.7


def test_without_the_reference_it_raises_the_reward_and_loses_modes():
    _, (mass, modes) = aligned_on_a_ring("path")
    assert mass > 0.85
    assert modes < 3
