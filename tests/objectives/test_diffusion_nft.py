"""DiffusionNFT: its formula, its direction, how its old policy follows, what it may depend on, what it refuses."""

import math

import attrs
import pytest
import torch
from chosen import SAMPLES, assert_gradient_is_of_the_whole, assert_standardised, assert_two_steps_on_a_ring, batch_for
from hypothesis import given
from hypothesis import strategies as st
from ring import MODES, rewarded
from tiny import assert_same, gradient, pair

from diffalign import AlignmentLoop
from diffalign.core import Linear, NonFiniteError
from diffalign.objectives import DiffusionNFT
from diffalign.objectives.diffusion_nft import nft_loss
from diffalign.objectives.noised import NoisedSamples
from diffalign.prompts import Prompts
from diffalign.samplers import Branching, DeterministicSampler
from diffalign.testing import TinyPolicy, channel_reward

SETTINGS = pytest.mark.parametrize("adaptive", [False, True], ids=["plain", "adaptive"])


def velocities(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 5, 2, 2, generator=generator, dtype=torch.float64)


@given(st.integers(0, 99), st.floats(0.05, 3), st.lists(st.floats(0, 1), min_size=5, max_size=5))
def test_the_loss_is_a_share_of_the_positive_and_of_the_negative_policy(seed, beta, shares):
    velocity, old, target = velocities(seed)
    sigma, optimality = torch.linspace(0.1, 1, 5, dtype=torch.float64), torch.tensor(shares, dtype=torch.float64)
    plain = nft_loss(velocity, old, target, sigma, optimality, beta, adaptive=False)
    adaptive = nft_loss(velocity, old, target, sigma, optimality, beta, adaptive=True)
    for row in range(5):
        positive = (1 - beta) * old[row] + beta * velocity[row]
        negative = (1 + beta) * old[row] - beta * velocity[row]
        errors = [((policy - target[row]) ** 2).mean() for policy in (positive, negative)]
        assert plain[row] == pytest.approx(float(shares[row] * errors[0] + (1 - shares[row]) * errors[1]))
        clean = target.new_zeros(2, 2) - sigma[row] * target[row]  # in x_0, of the same noisy latent
        parts = []
        for policy in (positive, negative):
            gap = -sigma[row] * policy - clean
            parts.append((gap**2).mean() / gap.abs().mean())
        assert adaptive[row] == pytest.approx(float(shares[row] * parts[0] + (1 - shares[row]) * parts[1]))


def test_the_weight_of_the_adaptive_loss_has_no_gradient():
    velocity, old, target = velocities()
    sigma, half = torch.full((5,), 0.5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    leaf = velocity.clone().requires_grad_()
    (found,) = torch.autograd.grad(nft_loss(leaf, old, target, sigma, half, 1.0, adaptive=True).sum(), leaf)
    gap = velocity - target
    torch.testing.assert_close(found, 0.5 * 2 * gap / 4 / gap.abs().mean(dim=(1, 2), keepdim=True))


def test_where_the_old_policy_is_the_policy_it_follows_the_reward():
    """There the gradient is that of 2 beta (2 r - 1) <v_theta, v_old - v>."""
    policy, _ = pair()
    batch = batch_for(policy)
    objective = DiffusionNFT(policy, beta=0.3, adaptive=False, limit=2.0, levels=3)
    samples = NoisedSamples.draw(batch, 3, 0.0, False, "diffusion_nft/0", "DiffusionNFT")
    noised = samples.at(torch.arange(len(samples)))
    velocity = policy.velocity(noised.latents, noised.sigma, noised.condition)
    rewards, group = batch.rewards.double(), batch.trajectories.group
    score = torch.cat([(rewards[group == g] - rewards[group == g].mean()) / rewards[group == g].std(correction=0) for g in range(3)])
    direction = (velocity.detach() - noised.target) * (score.clamp(-2, 2) / 2)[samples.sample][:, None, None]
    value = 2 * 0.3 * (velocity * direction).flatten(1).mean(dim=1).mean()
    expected = torch.cat([part.flatten() for part in torch.autograd.grad(value, list(policy.trainable_parameters().values()))])
    assert_same(gradient(objective, batch), expected)


@SETTINGS
def test_a_step_downhill_denoises_good_samples_better_than_bad_ones(adaptive):
    policy, _ = pair()
    batch = batch_for(policy)
    objective = DiffusionNFT(policy, adaptive=adaptive)
    samples = NoisedSamples.draw(batch, 4, 0.0, False, "diffusion_nft/0", "DiffusionNFT")
    noised = samples.at(torch.arange(len(samples)))

    def errors():
        with torch.no_grad():
            return (policy.velocity(noised.latents, noised.sigma, noised.condition) - noised.target).flatten(1).square().mean(dim=1)

    before, found, place = errors(), gradient(objective, batch), 0
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter -= 1e-3 * found[place : place + parameter.numel()].reshape(parameter.shape)
            place += parameter.numel()
    rewards = batch.rewards.double().reshape(3, 4)
    advantage = ((rewards - rewards.mean(dim=1, keepdim=True)) / rewards.std(dim=1, keepdim=True)).flatten()[samples.sample]
    assert float((advantage * (errors() - before)).sum()) < -1e-9


@pytest.mark.parametrize("options", [{}, {"adaptive": False, "levels": 3, "kl": 0.2}, {"beta": 0.2, "sigma_min": 0.3}], ids=repr)
def test_the_gradient_is_that_of_the_whole(options):
    policy, reference = pair()
    given_reference = reference if "kl" in options else None
    assert_gradient_is_of_the_whole(lambda rows: DiffusionNFT(policy, given_reference, rows=rows, **options))


def test_the_penalty_has_the_gradient_of_the_distance_to_the_reference():
    policy, reference = pair()
    batch = batch_for(policy)
    samples = NoisedSamples.draw(batch, 4, 0.0, False, "diffusion_nft/0", "DiffusionNFT")
    noised = samples.at(torch.arange(len(samples)))
    apart = policy.velocity(noised.latents, noised.sigma, noised.condition)
    apart = apart - reference.velocity(noised.latents, noised.sigma, noised.condition).detach()
    value = 0.2 * apart.square().flatten(1).mean(dim=1).mean()
    expected = torch.cat([part.flatten() for part in torch.autograd.grad(value, list(policy.trainable_parameters().values()))])
    assert_same(gradient(DiffusionNFT(policy, reference, kl=0.2), batch) - gradient(DiffusionNFT(policy), batch), expected, 1e-8)


@SETTINGS
def test_only_the_order_and_spacing_of_rewards_counts(adaptive):
    policy, _ = pair()
    assert_standardised(lambda: DiffusionNFT(policy, adaptive=adaptive))


def test_equal_rewards_pull_back_to_the_old_policy():
    policy, _ = pair()
    objective = DiffusionNFT(policy, adaptive=False)
    batch = batch_for(policy)
    batch = attrs.evolve(batch, rewards=torch.full_like(batch.rewards, 0.7))
    with torch.no_grad():
        policy.network.lora_B.weight += 0.1
    found = gradient(objective, batch)
    back = torch.cat(
        [torch.zeros_like(policy.network.lora_A.weight).flatten(), torch.full_like(policy.network.lora_B.weight, -0.1).flatten()]
    )
    assert float(-found @ back) > 0


def test_inner_updates_draw_noise_of_their_own():
    policy, _ = pair()
    batch = batch_for(policy)
    objective = DiffusionNFT(policy, updates=2)
    first, second = gradient(objective, batch, 0), gradient(objective, batch, 1)
    assert float((first - second).norm()) > 1e-3 * float(first.norm())
    assert objective.phases()[0].repeats == 2


def test_the_old_policy_rolls_out_and_follows():
    policy, _ = pair()
    objective = DiffusionNFT(policy, decay=Linear(0.25, 1.0, 3))
    assert objective.behavior() is objective.old
    assert objective.policies() == {"policy": policy, "old": objective.old}
    assert not objective.old.trainable_parameters()
    start = policy.network.lora_B.weight.detach().clone()
    with torch.no_grad():
        policy.network.lora_B.weight += 1.0
    gradient(objective, batch_for(policy, step=1))
    assert torch.equal(objective.old.network.lora_B.weight, start)  # only after the step
    objective.after_step()
    torch.testing.assert_close(objective.old.network.lora_B.weight, start + 0.5)  # kept 0.25 + 0.75 / 3
    assert objective.old.network.body is policy.network.body


def test_on_policy_by_default_at_the_start_of_a_run():
    policy = TinyPolicy((2, 2))
    start = policy.network.lora_B.weight.detach().clone()
    objective = DiffusionNFT(policy)
    loop = AlignmentLoop(objective, DeterministicSampler(6, samples=4), channel_reward, Prompts(["a", "b"]), prompts_per_step=2)
    loop.run(1)
    assert not torch.equal(policy.network.lora_B.weight, start)
    assert torch.equal(objective.old.network.lora_B.weight, policy.network.lora_B.weight)


def test_metrics_say_what_happened():
    policy, reference = pair()
    batch = batch_for(policy)
    for rows in (None, 5):
        (phase,) = DiffusionNFT(policy, reference, kl=0.2, rows=rows).phases()
        losses = list(phase.losses(batch, 0))
        table = {name: torch.tensor([[float(x) for x in loss.metrics[name]] for loss in losses]).sum(dim=0) for name in losses[0].metrics}
        means = {name: float(total / count) for name, (total, count) in table.items()}
        assert means["loss"] == pytest.approx(float(sum(loss.value.detach() for loss in losses)), rel=1e-5)
        assert means["optimality"] == pytest.approx(0.5)
        assert means["distance/old"] == 0
        assert means["distance/reference"] > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda policy: DiffusionNFT(policy, beta=0.0), "beta"),
        (lambda policy: DiffusionNFT(policy, limit=0.0), "limit"),
        (lambda policy: DiffusionNFT(policy, levels=0), "levels"),
        (lambda policy: DiffusionNFT(policy, sigma_min=1.5), "sigma_min"),
        (lambda policy: DiffusionNFT(policy, rows=0), "rows"),
        (lambda policy: DiffusionNFT(policy, kl=-1.0), "DiffusionNFT.kl must be at least 0 and finite"),
        (lambda policy: DiffusionNFT(policy, policy.fork()), r"DiffusionNFT\.reference has no use if DiffusionNFT\.kl is 0"),
        (lambda policy: DiffusionNFT(policy, policy.fork(trainable=True), kl=0.1), "reference must be frozen: 2 parameters require grad"),
    ],
)
def test_options_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(TinyPolicy())


def test_a_decay_or_a_number_of_levels_that_cannot_be_is_refused_before_a_weight_moves():
    policy, _ = pair()
    with pytest.raises(ValueError, match=r"DiffusionNFT.decay must lie in \[0, 1\]; got 1.2 at step 2"):
        gradient(DiffusionNFT(policy, decay=1.2), batch_for(policy))
    with pytest.raises(ValueError, match=r"DiffusionNFT.levels must be at most .* 6; got 7"):
        gradient(DiffusionNFT(policy, levels=7), batch_for(policy))
    with pytest.raises(ValueError, match="DiffusionNFT needs at least 2 samples per prompt to compare; prompt 'a red cube' has 1"):
        gradient(DiffusionNFT(policy), batch_for(policy, Branching((1, 1, 1, 1), (0.0,) * 4)))


def test_velocities_that_are_not_finite_are_an_error_with_an_address():
    policy, reference = pair()
    batch = batch_for(policy, SAMPLES)
    with torch.no_grad():
        reference.network.lora_B.weight.fill_(math.nan)
    with pytest.raises(NonFiniteError, match=r"the velocity of the reference is not finite at sigma .*, prompt 'a red cube'. Nothing was"):
        gradient(DiffusionNFT(policy, reference, kl=0.1), batch)
    objective = DiffusionNFT(policy)
    with torch.no_grad():
        policy.network.lora_B.weight.fill_(math.inf)
    with pytest.raises(NonFiniteError, match="the velocity of the policy, or of its old weights, is not finite"):
        gradient(objective, batch)


@pytest.mark.parametrize("options", [{}, {"kl": 0.1, "adaptive": False, "updates": 2, "rows": 5}], ids=repr)
def test_two_steps_on_a_ring(options):
    assert_two_steps_on_a_ring(lambda policy: DiffusionNFT(policy, **options), DeterministicSampler(8, samples=6), MODES, rewarded)
