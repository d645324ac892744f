"""Fixed points of AWM, CRD and RAM on a closed form: p_ref = N(0, c^2 I) in two dimensions, whose first coordinate is the reward.

Let V = (1 - sigma)^2 c^2 + sigma^2. A policy N(m, c^2 I) has v = v_ref - sigma / V m, and its error on x_sigma is

    v - (e - x_0) = sigma / V (x_0 - m) - (1 - sigma) c^2 / V e

The samples of a group share e in AWM and CRD, so e cancels in every sum of centred numbers. The gradient on m then is a finite sum without
noise if each group has the standard deviation c, and the tests hold to rounding.
"""

import attrs
import pytest
import torch
from chosen import PROMPTS, batch_for
from tiny import assert_same, gradient, pair

from diffalign.core import Progress, ScoredBatch, Streams, group_normalize
from diffalign.objectives import AWM, CRD, RAM
from diffalign.objectives.noised import NoisedSamples
from diffalign.policies import GaussianMixturePolicy
from diffalign.samplers import DeterministicSampler

WIDTH = 0.7


def gaussian(mean, trainable=True):
    policy = GaussianMixturePolicy(torch.tensor([[mean, 0.0]], dtype=torch.float64), WIDTH).requires_grad_(trainable)
    policy.log_weights.requires_grad_(False)
    return policy


def samples_of(policy, noise, steps, highest=1.0):
    """Batch whose samples are mean + c noise, on a grid of equal steps from a level on; the reward is the first coordinate."""
    with torch.no_grad():
        forest = DeterministicSampler(steps, samples=len(noise) // 3).sample(policy, policy.encode(PROMPTS), Progress(0, 1), Streams(3))
    latents = forest.latents.clone()
    latents[forest.leaves] = policy.means.detach() + WIDTH * noise
    forest = attrs.evolve(forest, latents=latents, sigmas=forest.sigmas * highest)
    rewards = forest.samples[:, 0]
    return ScoredBatch(forest, rewards, {"r": rewards}, 3, Progress(0, 1), Streams(4))


def standard_noise(samples):
    """Noise [3 samples, 2] whose coordinates have the mean 0 and the deviation 1 in each group, and do not correlate there."""
    noise = torch.randn(3, samples, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whitened = torch.linalg.qr(noise - noise.mean(dim=1, keepdim=True))[0]
    return whitened.flatten(0, 1) * samples**0.5


def slopes(sigmas):
    """(sigma / V)^2 of noise levels."""
    sigmas = torch.as_tensor(sigmas, dtype=torch.float64)
    return (sigmas / ((1 - sigmas) ** 2 * WIDTH**2 + sigmas**2)).square()


GRID = gaussian(0.0).sigmas(6)[:-1]


def awm_pull(mean, kl):
    """Gradient of AWM on the mean, from samples of a policy that has gone so far, over all levels of the grid."""
    policy = gaussian(mean)
    batch = samples_of(policy, standard_noise(8), len(GRID))
    return gradient(AWM(policy, gaussian(0.0, trainable=False) if kl else None, limit=4.0, kl=kl, levels=len(GRID)), batch)


@pytest.mark.parametrize("kl", [0.1, 0.5])
def test_the_fixed_point_of_awm_is_the_tilt_at_the_temperature_of_its_penalty(kl):
    """A = (x - mean) / (c limit), so the tilt p_ref exp(A / kl) / Z is N(c / (limit kl), c^2)."""
    tilt = WIDTH / (4.0 * kl)
    start = awm_pull(0.0, kl)
    torch.testing.assert_close(start, torch.tensor([-2 / 2 * float(slopes(GRID).mean()) * WIDTH / 4.0, 0.0], dtype=torch.float64))
    assert float(awm_pull(tilt, kl).norm()) < 1e-12 * float(start.norm())
    torch.testing.assert_close(awm_pull(2 * tilt, kl), -start)


def test_without_a_penalty_awm_goes_on_for_ever():
    """The pull is the same however far the policy has gone; it ends only where all samples of a group have one reward."""
    start = awm_pull(0.0, 0.0)
    assert start[0] < -0.01
    torch.testing.assert_close(awm_pull(50.0, 0.0), start)
    policy = gaussian(1.0)
    alike = samples_of(policy, standard_noise(8) * torch.tensor([0.0, 1.0]), len(GRID))
    assert float(gradient(AWM(policy, kl=0.0, levels=len(GRID)), alike).norm()) == 0.0


def test_awm_has_the_gradient_of_ram_with_its_advantage_as_the_reward():
    """Times kl, with beta = 1 / kl, on any network and for each noise."""
    policy, reference = pair()
    batch = batch_for(policy)
    drawn = NoisedSamples.draw(batch, 4, 0.0, True, "awm/0", "Mine")
    noised, sample = drawn.at(torch.arange(len(drawn))), drawn.sample
    advantage = (group_normalize(batch.rewards.double(), batch.trajectories.group) / 5)[sample][:, None, None]
    velocity = noised.velocity(policy)
    with torch.no_grad():
        target = noised.velocity(reference) + advantage / 0.3 * (noised.target - velocity)
    value = 0.3 * (velocity - target).flatten(1).square().mean(dim=1).mean()
    expected = torch.cat([part.flatten() for part in torch.autograd.grad(value, list(policy.trainable_parameters().values()))])
    assert_same(gradient(AWM(policy, reference, kl=0.3, clip=None), batch), expected)


def crd_at(mean, steps, highest=1.0):
    """Gradient on the mean and mean squared residual of CRD, whose old weights, the reference, drew the samples and stand still."""
    policy = gaussian(0.0)
    objective = CRD(policy, beta=3.0, limit=4.0, decay=1.0, kl=0.0, levels=steps)
    batch = samples_of(policy, standard_noise(8), steps, highest)
    with torch.no_grad():
        policy.means[0, 0] = mean
    objective.after_step()
    assert float(objective.old.means.abs().max()) == 0.0
    (loss,) = objective.losses(batch, 0)
    total, count = loss.metrics["residual"]
    return gradient(objective, batch), float(total / count)


SHIFT = 1 / (2 * 4.0 * WIDTH) / 3.0
"""Slope of R~ / beta in x, for beta 3 and limit 4: the tilt p_old exp(R~ / beta) / Z has the mean c^2 SHIFT."""


@pytest.mark.parametrize("sigma", [1.0, 0.5, 0.2])
def test_the_residual_of_crd_is_zero_level_by_level_at_a_multiple_of_its_tilt(sigma):
    """beta (r - mean r) = beta 2 m / D (sigma / V)^2 (x - mean x), which is R~ - mean R~ at m = D V^2 / (2 sigma^2) SHIFT."""
    tilt = WIDTH**2 * SHIFT
    factor = 2 / (2 * float(slopes(sigma)) * WIDTH**2)
    start, most = crd_at(0.0, 1, sigma)
    end, least = crd_at(factor * tilt, 1, sigma)
    assert most == pytest.approx(1 / (2 * 4.0) ** 2)
    assert least < 1e-24
    assert float(end.norm()) < 1e-12 * float(start.norm())
    assert factor > 1.1
    assert crd_at(tilt, 1, sigma)[1] == pytest.approx((1 - 1 / factor) ** 2 / 64)  # what is left at the tilt itself
    assert start[0] < 0 < crd_at(2 * factor * tilt, 1, sigma)[0][0]


def test_levels_that_share_weights_get_the_compromise_of_crd_by_least_squares():
    """The mean is one number for all levels: sum_l a_l (a_l m 2 / D - SHIFT) = 0 with a_l = (sigma / V)^2."""
    slope = slopes(GRID)
    end = float(slope.sum() / slope.square().sum()) * SHIFT
    start = crd_at(0.0, len(GRID))[0]
    assert float(start[0]) == pytest.approx(-4.0 / 3.0 * 2 * 3.0**2 * SHIFT * float(slope.mean()) * WIDTH**2)  # limit / beta of the loss
    assert abs(float(crd_at(end, len(GRID))[0][0])) < 1e-12 * float(start.norm())
    assert crd_at(end, len(GRID))[1] > 1e-4


def test_the_fixed_point_of_ram_is_the_tilt_by_a_linear_reward():
    """The tilt is N(beta c^2, c^2). Elsewhere the mean gradient leads towards it."""

    def pull(mean):
        policy = gaussian(mean)
        return float(gradient(RAM(policy, gaussian(0.0, trainable=False), beta=1.5), samples_of(policy, standard_noise(100), 6))[0])

    tilt = 1.5 * WIDTH**2
    below, at, above = pull(tilt - 0.2), pull(tilt), pull(tilt + 0.2)
    assert below < 0 < above
    assert abs(at) < 0.2 * min(-below, above)
