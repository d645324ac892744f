"""DGPO: its formula in both forms, its trust region, what it may depend on, what it refuses."""

import math

import attrs
import pytest
import torch
from chosen import assert_gradient_is_of_the_whole, assert_standardised, assert_two_steps_on_a_ring, batch_for
from ring import MODES, rewarded
from tiny import assert_same, gradient, pair

from diffalign.core import NonFiniteError
from diffalign.objectives import DGPO
from diffalign.objectives.noised import NoisedSamples
from diffalign.samplers import Branching, DeterministicSampler
from diffalign.testing import TinyPolicy

FREE = {"clip": None, "kl": 0.0}
"""The preference alone."""


def terms(policy, reference, batch, levels=4, sigma_min=0.5):
    """Errors d and d_ref, [3 prompts, 4 samples, levels], and advantages [3, 4, 1], for the draws of the first update."""
    samples = NoisedSamples.draw(batch, levels, sigma_min, True, "dgpo/0", "DGPO")
    noised = samples.at(torch.arange(len(samples)))

    def errors(weights):
        gap = weights.velocity(noised.latents, noised.sigma, noised.condition) - noised.target
        return gap.flatten(1).square().mean(dim=1).reshape(3, 4, levels)

    with torch.no_grad():
        baseline = errors(reference)
    rewards = batch.rewards.double().reshape(3, 4)
    advantage = (rewards - rewards.mean(dim=1, keepdim=True)) / rewards.std(dim=1, correction=0, keepdim=True)
    return errors(policy), baseline, advantage[:, :, None]


def derivative(policy, value):
    return torch.cat([part.flatten() for part in torch.autograd.grad(value, list(policy.trainable_parameters().values()))])


@pytest.mark.parametrize("beta", [3.0, 20.0])
def test_both_forms_have_the_gradient_of_their_formula(beta):
    policy, reference = pair()
    batch = batch_for(policy)
    error, baseline, advantage = terms(policy, reference, batch)
    margin = beta * (advantage * (error - baseline)).mean(dim=1)  # [3, levels]
    assert float(margin.detach().abs().max()) > 0.1
    softplus = (1 + margin.exp()).log().mean()
    exact = derivative(policy, softplus)
    error, _, _ = terms(policy, reference, batch)
    released = derivative(policy, (margin.detach().sigmoid()[:, None] * advantage * error).mean())
    assert_same(gradient(DGPO(policy, reference, beta=beta, loss="softplus", **FREE), batch), exact)
    assert_same(gradient(DGPO(policy, reference, beta=beta, **FREE), batch), released)
    assert_same(beta * released, exact)


def test_at_the_reference_it_is_advantage_weighted_regression():
    policy, _ = pair()
    batch = batch_for(policy)
    error, _, advantage = terms(policy, policy.fork(), batch)
    assert_same(gradient(DGPO(policy, **FREE), batch), derivative(policy, 0.5 * (advantage * error).mean()))


def test_the_distance_to_the_reference_is_added():
    policy, reference = pair()
    batch = batch_for(policy)
    samples = NoisedSamples.draw(batch, 4, 0.5, True, "dgpo/0", "DGPO")
    noised = samples.at(torch.arange(len(samples)))
    arguments = (noised.latents, noised.sigma, noised.condition)
    with torch.no_grad():
        other = reference.velocity(*arguments)
    distance = (policy.velocity(*arguments) - other).square().mean()
    alone = gradient(DGPO(policy, reference, **FREE), batch)
    assert_same(gradient(DGPO(policy, reference, clip=None, kl=0.3), batch) - alone, 0.3 * derivative(policy, distance), tolerance=1e-9)


def test_a_sample_far_from_the_old_policy_has_no_gradient():
    policy, reference = pair()
    objective = DGPO(policy, reference, beta=5.0, clip=1e-2, kl=0.0)
    batch = batch_for(policy)
    with torch.no_grad():
        old, _, _ = terms(policy, reference, batch)
        policy.network.lora_B.weight += 0.05
    error, baseline, advantage = terms(policy, reference, batch)
    ratio = (old - error.detach()).exp()
    outside = torch.where(advantage > 0, ratio > 1.01, ratio < 0.99)
    assert 0 < int(outside.sum()) < outside.numel()
    margin = 5.0 * (advantage * (error - baseline)).mean(dim=1).detach()
    value = (margin.sigmoid()[:, None] * advantage * torch.where(outside, error.detach(), error)).mean()
    (phase,) = objective.phases()
    (loss,) = phase.losses(batch, 0)
    clipped, count = loss.metrics["ratio/clipped"]
    assert (int(clipped), int(count)) == (int(outside.sum()), outside.numel())
    assert_same(gradient(objective, batch), derivative(policy, value))


@pytest.mark.parametrize("loss", ["weighted", "softplus"])
def test_a_step_downhill_denoises_good_samples_better_than_bad_ones(loss):
    policy, reference = pair()
    batch = batch_for(policy)
    with torch.no_grad():
        before, _, advantage = terms(policy, reference, batch)
    found, place = gradient(DGPO(policy, reference, beta=1.0, loss=loss, **FREE), batch), 0
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter -= 1e-3 * found[place : place + parameter.numel()].reshape(parameter.shape)
            place += parameter.numel()
        after, _, _ = terms(policy, reference, batch)
    assert float((advantage * (after - before)).sum()) < -1e-9


@pytest.mark.parametrize(
    "options", [{}, {"loss": "softplus", "beta": 3.0}, {"kl": 0.3, "clip": None, "levels": 2, "sigma_min": 0.0}], ids=repr
)
def test_the_gradient_is_that_of_the_whole(options):
    policy, reference = pair()
    assert_gradient_is_of_the_whole(lambda rows: DGPO(policy, reference, rows=rows, **options))


def test_only_the_order_and_spacing_of_rewards_counts():
    policy, _ = pair()
    assert_standardised(lambda: DGPO(policy, **FREE))  # at the reference, where the weight is 1/2 whatever the sign


def test_equal_rewards_leave_the_distance_alone():
    policy, reference = pair()
    batch = batch_for(policy)
    batch = attrs.evolve(batch, rewards=torch.full_like(batch.rewards, 0.7))
    assert float(gradient(DGPO(policy, reference, **FREE), batch).norm()) < 1e-12
    once = gradient(DGPO(policy, reference, clip=None, kl=0.1), batch)
    assert_same(gradient(DGPO(policy, reference, clip=None, kl=0.3), batch), 3.0 * once)


def test_the_reference_costs_one_row_a_unit_however_the_update_is_cut():
    for rows in (None, 5):
        policy, reference = pair()
        batch = batch_for(policy)
        objective = DGPO(policy, reference, rows=rows)
        before = reference.counter.rows, objective.old.counter.rows, policy.counter.rows
        gradient(objective, batch)
        units = 3 * 4 * 4
        assert reference.counter.rows - before[0] == objective.old.counter.rows - before[1] == units
        assert policy.counter.rows - before[2] == units * (1 if rows is None else 2)


def test_the_old_policy_follows_after_the_step():
    policy, reference = pair()
    objective = DGPO(policy, reference, decay=0.25)
    assert objective.policies() == {"policy": policy, "reference": reference, "old": objective.old}
    assert objective.behavior() is policy
    start = policy.network.lora_B.weight.detach().clone()
    with torch.no_grad():
        policy.network.lora_B.weight += 1.0
    gradient(objective, batch_for(policy))
    assert torch.equal(objective.old.network.lora_B.weight, start)
    objective.after_step()
    torch.testing.assert_close(objective.old.network.lora_B.weight, start + 0.75)
    without = DGPO(policy, reference, clip=None)
    assert without.policies() == {"policy": policy, "reference": reference}
    without.after_step()


def test_inner_updates_draw_noise_of_their_own():
    policy, reference = pair()
    batch = batch_for(policy)
    objective = DGPO(policy, reference, updates=2)
    first, second = gradient(objective, batch, 0), gradient(objective, batch, 1)
    assert float((first - second).norm()) > 1e-3 * float(first.norm())


def test_metrics_say_what_happened():
    policy, _ = pair()
    (phase,) = DGPO(policy).phases()
    (loss,) = phase.losses(batch_for(policy), 0)
    means = {name: float(total) / float(count) for name, (total, count) in loss.metrics.items()}
    assert means["loss"] == pytest.approx(float(loss.value.detach()))
    assert means["weight"] == pytest.approx(0.5)  # at the reference
    assert means["dgpo"] == pytest.approx(math.log(2))
    assert means["ratio/clipped"] == means["distance/reference"] == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda policy: DGPO(policy, beta=0.0), "beta"),
        (lambda policy: DGPO(policy, clip=0.0), "clip"),
        (lambda policy: DGPO(policy, kl=-0.1), "kl"),
        (lambda policy: DGPO(policy, levels=0), "levels"),
        (lambda policy: DGPO(policy, sigma_min=-0.1), "sigma_min"),
        (lambda policy: DGPO(policy, rows=0), "rows"),
        (lambda policy: DGPO(policy, policy.fork(trainable=True)), "reference must be frozen: 2 parameters require grad"),
        (lambda policy: DGPO(policy, policy), "reference must be frozen"),
    ],
)
def test_options_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(TinyPolicy())


def test_what_a_batch_cannot_give_is_refused():
    policy, _ = pair()
    with pytest.raises(ValueError, match=r"DGPO.decay must lie in \[0, 1\]; got -0.5 at step 2"):
        gradient(DGPO(policy, decay=-0.5), batch_for(policy))
    with pytest.raises(ValueError, match=r"DGPO.levels must be at most .* from sigma_min 0.9 on, 2; got 4"):
        gradient(DGPO(policy, sigma_min=0.9), batch_for(policy))
    with pytest.raises(ValueError, match="DGPO needs at least 2 samples per prompt to compare; prompt 'a red cube' has 1"):
        gradient(DGPO(policy), batch_for(policy, Branching((1, 1, 1, 1), (0.0,) * 4)))


def test_velocities_that_are_not_finite_are_an_error_with_an_address():
    policy, reference = pair()
    batch = batch_for(policy)
    with torch.no_grad():
        reference.network.lora_B.weight.fill_(math.nan)
    with pytest.raises(NonFiniteError, match=r"the velocity of the reference is not finite at sigma .*, prompt 'a red cube'. Nothing was"):
        gradient(DGPO(policy, reference), batch)
    objective = DGPO(policy)
    with torch.no_grad():
        policy.network.lora_B.weight.fill_(math.inf)
    with pytest.raises(NonFiniteError, match="the velocity of the policy is not finite"):
        gradient(objective, batch)


@pytest.mark.parametrize("options", [{}, {"loss": "softplus", "clip": None, "updates": 2, "rows": 5}], ids=repr)
def test_two_steps_on_a_ring(options):
    assert_two_steps_on_a_ring(lambda policy: DGPO(policy, **options), DeterministicSampler(8, samples=6), MODES, rewarded)
