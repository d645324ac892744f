"""The bound: what it estimates on closed-form mixtures, what is drawn, and which weights it knows."""

import math

import attrs
import numpy
import pytest
import torch
from chosen import batch_for

from diffalign import Prompt
from diffalign.core import Progress, ScoredBatch, Streams
from diffalign.objectives import ELBO
from diffalign.objectives.elbo import Estimates
from diffalign.objectives.forward import ForwardBatch
from diffalign.policies import GaussianMixturePolicy
from diffalign.samplers import DeterministicSampler
from diffalign.testing import TinyPolicy

MODES = torch.tensor([[-1.5, 0.0], [1.5, 0.0], [0.0, 1.0]], dtype=torch.float64)


def log_density(policy, points, sigma):
    """log p of the distribution noised to a level, at points [..., 2]."""
    variance = (1 - sigma) ** 2 * policy.scale**2 + sigma**2
    squares = (points[..., None, :] - (1 - sigma) * policy.means).square().sum(dim=-1)
    return (policy.log_weights.log_softmax(0) - squares / (2 * variance)).logsumexp(-1) - math.log(2 * math.pi * variance)


def noised_log_ratio(policy, reference, samples, sigma, end=0.0):
    """Mean over the noise from `end` to a level of the exact log-ratio of the noised distributions, by Gauss-Hermite quadrature: [K]."""
    nodes, weights = (torch.from_numpy(values) for values in numpy.polynomial.hermite_e.hermegauss(24))
    grid = torch.cartesian_prod(nodes, nodes)
    weight = torch.outer(weights, weights).flatten() / weights.sum() ** 2
    kept = (1 - sigma) / (1 - end)
    points = kept * samples[:, None] + math.sqrt(sigma**2 - (kept * end) ** 2) * grid
    return ((log_density(policy, points, sigma) - log_density(reference, points, sigma)) * weight).sum(dim=1)


@pytest.fixture(scope="module")
def mixtures():
    policy = GaussianMixturePolicy(MODES + 0.2, 0.6, [0.5, 0.3, 0.2])
    reference = GaussianMixturePolicy(MODES, 0.6)
    with torch.no_grad():
        forest = DeterministicSampler(8, samples=8).sample(policy, policy.encode([Prompt("a")] * 3), Progress(0, 1), Streams(1))
    rewards = forest.samples[:, 0].detach()
    return policy, reference, ScoredBatch(forest, rewards, {"r": rewards}, 3, Progress(0, 1), Streams(2))


def estimated(bound, mixtures, name="n", count=2):
    policy, reference, batch = mixtures
    forward = ForwardBatch(Estimates(bound, count)(batch, name, "Mine"), None)
    with torch.no_grad():
        return bound.log_ratio(forward, forward.errors(reference, "reference"), forward.errors(policy, "policy"))


@pytest.mark.parametrize("sigma_min", [0.02, 0.3])
def test_it_is_the_exact_log_ratio_of_the_noised_distributions_in_nats(mixtures, sigma_min):
    policy, reference, batch = mixtures
    clean = batch.trajectories.samples
    with torch.no_grad():
        exact = noised_log_ratio(policy, reference, clean, sigma_min)
        sharp = log_density(policy, clean, 0.0) - log_density(reference, clean, 0.0)
    found = estimated(ELBO(levels=100, sigma_min=sigma_min, shared=False), mixtures, count=4)
    gap = found - exact
    assert float(gap.mean()) == pytest.approx(0.0, abs=0.02)
    assert float((exact * found.mean(dim=0)).sum() / exact.square().sum()) == pytest.approx(1.0, abs=0.03)
    assert float(gap.mean(dim=0).square().mean().sqrt()) < 0.1 * float(exact.std())
    assert float((exact - sharp).abs().max()) < 0.03 if sigma_min < 0.1 else float((exact - sharp).abs().max()) > 0.1


def test_each_rule_leaves_the_mean_and_two_of_them_lower_the_variance(mixtures):
    plain = ELBO(levels=8, sigma_min=0.02, shared=False, antithetic=False, stratified=False)
    rules = {
        "plain": plain,
        "stratified": attrs.evolve(plain, stratified=True),
        "both": attrs.evolve(plain, levels=4, antithetic=True, stratified=True),  # at equal rows
        "shared": attrs.evolve(plain, shared=True),
    }
    found = {name: torch.cat([estimated(bound, mixtures, f"{name}{i}", 4) for i in range(4)]) for name, bound in rules.items()}
    with torch.no_grad():
        exact = noised_log_ratio(*mixtures[:2], mixtures[2].trajectories.samples, 0.02)
    for name, values in found.items():
        scale = float(values.std(dim=0).mean()) / math.sqrt(values.numel())  # shared noise correlates the 8 samples of a prompt
        assert abs(float((values - exact).mean())) < (12 if name == "shared" else 4) * scale, name
    spread = {name: float(values.std(dim=0).mean()) for name, values in found.items()}
    assert spread["stratified"] < spread["plain"]
    assert spread["both"] < spread["plain"]


def sigma_of(samples, bound, count=2):
    return samples.sigma.view(len(samples.sigma), count, bound.levels, -1)


def test_levels_are_drawn_from_their_strata_and_noises_come_in_pairs():
    bound = ELBO(levels=3, sigma_min=0.1, shared=True)
    samples = Estimates(bound)(batch_for(TinyPolicy((2, 2), dtype=torch.float64)), "n", "Mine")
    assert len(samples) == 12 * Estimates(bound).units == 12 * 12
    sigma = sigma_of(samples, bound)
    edges = 0.1 + 0.9 * torch.arange(4) / 3
    for level in range(3):
        assert bool(((sigma[:, :, level] >= edges[level]) & (sigma[:, :, level] <= edges[level + 1])).all())
    assert torch.equal(sigma[..., 0], sigma[..., 1])
    assert torch.equal(sigma[:4], sigma[:1].expand(4, -1, -1, -1))  # shared by a prompt
    assert not torch.equal(sigma[0], sigma[4])
    assert not torch.equal(sigma[:, 0], sigma[:, 1])  # two estimates
    noised = samples.at(torch.arange(len(samples)))
    noise = (noised.latents + (1 - noised.sigma[:, None, None]) * noised.target).view(12, 2, 3, 2, 4)
    torch.testing.assert_close(noise[:, :, :, 0], -noise[:, :, :, 1])
    torch.testing.assert_close(noise[:4], noise[:1].expand_as(noise[:4]))
    assert not torch.allclose(noise[0, 0, 0], noise[0, 0, 1])
    assert not torch.allclose(noise[:, 0], noise[:, 1])


def test_without_the_rules_every_draw_is_its_own():
    bound = ELBO(levels=3, sigma_min=0.1, shared=False, antithetic=False, stratified=False)
    samples = Estimates(bound)(batch_for(TinyPolicy((2, 2), dtype=torch.float64)), "n", "Mine")
    assert len(samples) == 12 * 6
    assert len(samples.sigma.unique()) == 72
    assert bool((samples.sigma.view(12, 2, 3)[..., 0] > 0.4).any())  # not the first stratum alone
    target = samples.at(torch.arange(72)).target.flatten(1)
    assert float(target.std(dim=0).min()) > 0.5


def test_the_weights_of_the_table():
    sigma = torch.tensor([0.25, 0.5], dtype=torch.float64)
    expected = {"likelihood": [3.0, 1.0], "flow": [1.0, 1.0], "clean": [0.0625, 0.25], "noise": [0.5625, 0.25]}
    for name, values in expected.items():
        assert ELBO(weighting=name).weight(sigma).tolist() == pytest.approx(values)


def test_an_estimate_is_the_weighted_mean_of_its_units():
    bound = ELBO(levels=2, sigma_min=0.2)
    samples = Estimates(bound)(batch_for(TinyPolicy((2, 2), dtype=torch.float64)), "n", "Mine")
    baseline, error = torch.rand(2, len(samples), dtype=torch.float64)
    found = bound.log_ratio(ForwardBatch(samples, None), baseline, error)
    weight = ((1 - samples.sigma) / samples.sigma).double()
    by_hand = (0.8 * 4 * weight * (baseline - error).view(12, 8)).view(12, 2, 4).mean(dim=2)
    torch.testing.assert_close(found, by_hand.T)


def test_samples_that_end_above_0_have_the_log_ratio_of_the_level_to_which_they_are_taken(mixtures):
    policy, reference, batch = mixtures
    end, sigma_min = 0.25, 0.3
    grid = batch.trajectories.sigmas
    short = attrs.evolve(batch.trajectories, sigmas=torch.cat([grid[:-3], grid.new_tensor([0.29, 0.27, end])]))
    with torch.no_grad():
        exact = noised_log_ratio(policy, reference, short.samples, sigma_min, end)
    bound = ELBO(levels=400, sigma_min=sigma_min, shared=False)
    gap = estimated(bound, (policy, reference, attrs.evolve(batch, trajectories=short)), count=4).mean(dim=0) - exact
    assert float(gap.mean()) == pytest.approx(0.0, abs=0.02)
    assert float(gap.square().mean().sqrt()) < 0.06 * float(exact.std())


def test_the_range_of_levels_is_that_of_the_rollout():
    policy = TinyPolicy((2, 2), dtype=torch.float64)
    outline = DeterministicSampler(4, samples=2).outline(policy)
    low = attrs.evolve(outline, sigmas=outline.sigmas * 0.5)
    Estimates(ELBO(sigma_min=0.5)).require(outline, "Mine")
    with pytest.raises(ValueError, match=r"Mine.bound.sigma_min must lie below the first noise level of the rollout, 0\.5; got 0\.5"):
        Estimates(ELBO(sigma_min=0.5)).require(low, "Mine")
    short = attrs.evolve(outline, sigmas=outline.sigmas * 0.9 + 0.1)
    Estimates(ELBO(sigma_min=0.2)).require(short, "Mine")
    with pytest.raises(ValueError, match=r"Mine.bound.sigma_min must lie above the last noise level of the rollout, 0\.1, .*; got 0\.05"):
        Estimates(ELBO(sigma_min=0.05)).require(short, "Mine")
    for sigma_min, other, message in (
        (0.5, low, "below the first .* 0\\.5; got 0\\.5"),
        (0.05, short, "above the last .* 0\\.1, .* got 0\\.05"),
    ):
        with pytest.raises(ValueError, match=message):  # whichever step of the run has it
            Estimates(ELBO(sigma_min=sigma_min)).require(attrs.evolve(outline, others=(outline.sigmas, other.sigmas)), "Mine")
    batch = batch_for(policy)
    lower = attrs.evolve(batch, trajectories=attrs.evolve(batch.trajectories, sigmas=batch.trajectories.sigmas * 0.5))
    bound = ELBO(levels=2, sigma_min=0.2)
    whole, part = (Estimates(bound)(some, "n", "Mine") for some in (batch, lower))
    torch.testing.assert_close((part.sigma - 0.2) / 0.3, (whole.sigma - 0.2) / 0.8)
    ones = torch.ones(len(part), dtype=torch.float64)
    found = bound.log_ratio(ForwardBatch(part, None), ones, 0 * ones)
    torch.testing.assert_close(found, 0.3 * 4 * bound.weight(part.sigma).view(12, 2, 4).mean(dim=2).T)


@pytest.mark.parametrize("options", [{"levels": 0}, {"sigma_min": 0.0}, {"sigma_min": 1.0}, {"weighting": "snr"}], ids=repr)
def test_what_makes_no_sense_is_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ELBO(**options)
