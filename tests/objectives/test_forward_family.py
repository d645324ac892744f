"""AWM, CRD and RAM: their formulas, and what they may depend on. Their fixed points: `test_forward_fixed_points`."""

import attrs
import pytest
import torch
from chosen import assert_gradient_is_of_the_whole, assert_standardised, assert_two_steps_on_a_ring, batch_for
from ring import MODES, rewarded
from tiny import assert_same, gradient, pair

from diffalign.core import group_mean, group_normalize
from diffalign.objectives import AWM, CRD, RAM, KLMask
from diffalign.objectives.noised import NoisedSamples
from diffalign.samplers import DeterministicSampler

ALL = [AWM, CRD, RAM]


def drawn(name, shared, batch, levels=4):
    samples = NoisedSamples.draw(batch, levels, 0.0, shared, f"{name}/0", "Mine")
    return samples.sample, samples.at(torch.arange(len(samples)))


def squares(values):
    return values.flatten(1).square().mean(dim=1)


def derivative(policy, value):
    return torch.cat([part.flatten() for part in torch.autograd.grad(value, list(policy.trainable_parameters().values()))])


def scores(batch, sample, limit=5.0):
    return group_normalize(batch.rewards.double(), batch.trajectories.group).clamp(-limit, limit)[sample]


def test_awm_weighs_the_loss_of_pretraining_by_the_advantage():
    policy, reference = pair()
    batch = batch_for(policy)
    sample, noised = drawn("awm", True, batch)
    velocity = noised.velocity(policy)
    with torch.no_grad():
        distance_to = noised.velocity(reference)
    value = (scores(batch, sample, 1.2) / 1.2 * squares(velocity - noised.target) + 0.3 * squares(velocity - distance_to)).mean()
    assert_same(gradient(AWM(policy, reference, limit=1.2, kl=0.3), batch), derivative(policy, value))


def test_awm_holds_the_second_update_by_its_ratio():
    policy, _ = pair()
    batch = batch_for(policy)
    sample, noised = drawn("awm", True, batch)
    objective = AWM(policy, kl=0.0, clip=0.02, updates=2)
    masked = attrs.evolve(objective, mask=KLMask(1e-3))
    old = squares(noised.velocity(policy) - noised.target).detach()
    apart = noised.velocity(policy).detach()
    with torch.no_grad():
        policy.network.lora_B.weight += 0.03
    velocity = noised.velocity(policy)
    ratio, advantage = (old - squares(velocity - noised.target)).exp(), scores(batch, sample) / 5
    value = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.98, 1.02)).mean()
    assert 0 < int(((ratio - 1).abs() > 0.02).sum()) < len(ratio)
    assert_same(gradient(objective, batch), derivative(policy, value))
    velocity = noised.velocity(policy)
    ratio = (old - squares(velocity - noised.target)).exp()
    blocked = (squares(velocity - apart) / 2 > 1e-3) & (advantage * (ratio - 1) > 0)
    assert 0 < int(blocked.sum()) < len(ratio)
    assert_same(gradient(masked, batch), derivative(policy, (-advantage * ratio * ~blocked).mean()))


@pytest.mark.parametrize("adaptive", [False, True])
def test_crd_regresses_the_centred_implicit_reward_on_the_centred_reward(adaptive):
    policy, reference = pair()
    batch = batch_for(policy)
    objective = CRD(policy, reference, beta=2.0, limit=1.2, kl=0.3, adaptive=adaptive)
    with torch.no_grad():
        objective.old.network.lora_B.weight -= 0.1
    sample, noised = drawn("crd", True, batch)
    velocity = noised.velocity(policy)
    target = 0.5 + scores(batch, sample, 1.2) / 2.4
    with torch.no_grad():
        old, other = noised.velocity(objective.old), noised.velocity(reference)
    implicit = squares(old - noised.target) - squares(velocity - noised.target)

    def within(values):
        return values.view(3, 4, 4) - values.view(3, 4, 4).mean(dim=1, keepdim=True)

    weight = 1e-4 + (0.3 - 1e-4) * target if adaptive else 0.3
    value = 1.2 / 2.0 * (2.0 * within(implicit) - within(target)).square().mean() + (weight * squares(velocity - other)).mean()
    assert_same(gradient(objective, batch), derivative(policy, value))


def test_ram_regresses_on_the_reference_and_the_reward():
    policy, reference = pair()
    batch = batch_for(policy)
    sample, noised = drawn("ram", False, batch)
    velocity = noised.velocity(policy)
    rewards = batch.rewards.double()
    strength = 0.7 * (rewards - group_mean(rewards, batch.trajectories.group))[sample][:, None, None]
    with torch.no_grad():
        target = noised.velocity(reference) + strength * (noised.target - velocity)
    assert_same(gradient(RAM(policy, reference, beta=0.7), batch), derivative(policy, squares(velocity - target).mean()))


def test_the_old_weights_of_crd_follow_and_those_of_awm_are_the_rollouts():
    policy, reference = pair()
    crd, awm = CRD(policy, reference, decay=0.25), AWM(policy, kl=0.0, updates=2)
    assert crd.behavior() is awm.behavior() is policy
    assert AWM(policy, kl=0.0).policies() == {"policy": policy}
    start = policy.network.lora_B.weight.detach().clone()
    batch = batch_for(policy)
    for objective in (crd, awm):
        gradient(objective, batch)
    with torch.no_grad():
        policy.network.lora_B.weight += 1.0
    for objective in (crd, awm):
        assert torch.equal(objective.old.network.lora_B.weight, start)
        objective.after_step()
    torch.testing.assert_close(crd.old.network.lora_B.weight, start + 0.75)
    torch.testing.assert_close(awm.old.network.lora_B.weight, start + 1.0)


@pytest.mark.parametrize("make", [lambda policy: AWM(policy, kl=0.0, limit=10.0)], ids=["awm"])
def test_only_the_order_and_spacing_of_rewards_counts(make):
    policy, _ = pair()
    assert_standardised(lambda: make(policy))


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_the_gradient_is_that_of_the_whole(kind):
    policy, reference = pair()
    assert_gradient_is_of_the_whole(lambda rows: kind(policy, reference, rows=rows, levels=3))


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_two_steps_on_a_ring(kind):
    assert_two_steps_on_a_ring(lambda policy: kind(policy, rows=7), DeterministicSampler(6, samples=4), MODES, rewarded)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda policy: AWM(policy, policy.fork(), kl=0.0), "AWM.reference has no use if AWM.kl is 0"),
        (lambda policy: AWM(policy, limit=0.0), "limit"),
        (lambda policy: CRD(policy, beta=0.0), "beta"),
        (lambda policy: CRD(policy, policy.fork(trainable=True)), "reference must be frozen"),
        (lambda policy: RAM(policy, beta=-1.0), "beta"),
        (lambda policy: RAM(policy, policy.fork(trainable=True)), "reference must be frozen"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(pair()[0])
