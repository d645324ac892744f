"""DGPO and DiffusionNFT against their formulas, written out sample by sample: of the package there is only the policy.

Levels and noise are read off the latents that the policy is called with: x = (1 - sigma) x_0 + sigma e.
"""

import pytest
import torch
from chosen import PROMPTS

from diffalign.core import Progress, ScoredBatch, Streams
from diffalign.objectives import DGPO, DiffusionNFT
from diffalign.policies import GaussianMixturePolicy
from diffalign.samplers import DeterministicSampler

SAMPLES = 4
LEVELS = 2
REWARDS = [0.1, 0.7, 0.4, -0.9, 2.0, 2.5, 1.0, 2.1, -3.0, 0.0, 1.0, 5.0]


class Watched(GaussianMixturePolicy):
    """Keeps what it is called with."""

    calls = ()

    def velocity(self, latents, sigma, condition):
        self.calls = (*self.calls, (latents.detach(), sigma))
        return super().velocity(latents, sigma, condition)


def trio():
    """A policy, older weights and a reference, all of them different."""
    policies = []
    for shift in (0.0, 0.05, 0.2):
        means = torch.tensor([[-1.0, 0.3], [0.8, -0.5], [0.2, 1.1]], dtype=torch.float64) + shift
        policies.append(Watched(means, 0.4, [0.5 - shift, 0.3, 0.2 + shift]))
    policy, old, reference = policies
    return policy, old, reference.requires_grad_(False)


def batch_of(policy):
    with torch.no_grad():
        forest = DeterministicSampler(5, samples=SAMPLES).sample(policy, policy.encode(PROMPTS), Progress(0, 1), Streams(3))
    rewards = torch.tensor(REWARDS, dtype=torch.float64)
    return ScoredBatch(forest, rewards, {"r": rewards}, len(PROMPTS), Progress(0, 1), Streams(4))


def found(objective, old, batch):
    """Loss and gradient of an objective whose old weights are given, and the latents and levels of its units."""
    if objective.old is not None:
        objective.old.lerp_(old, 1.0)
    objective.policy.calls = ()
    (phase,) = objective.phases()
    (loss,) = phase.losses(batch, 0)
    latents, sigma = objective.policy.calls[0]
    assert len(latents) == len(PROMPTS) * SAMPLES * LEVELS
    return float(loss.value.detach()), derivative(objective.policy, loss.value), (latents, sigma)


def derivative(policy, value):
    return torch.cat([part.flatten() for part in torch.autograd.grad(value, [policy.means, policy.log_weights])])


def advantages(group):
    """(R - mean R) / std R of a prompt."""
    rewards = REWARDS[SAMPLES * group : SAMPLES * (group + 1)]
    mean = sum(rewards) / SAMPLES
    deviation = (sum((reward - mean) ** 2 for reward in rewards) / SAMPLES) ** 0.5
    return [(reward - mean) / deviation for reward in rewards]


def unit(units, group, sample, level):
    """x_sigma [1, 2] and sigma [1] of a sample at one of its levels."""
    place = (SAMPLES * group + sample) * LEVELS + level
    return units[0][place : place + 1], units[1][place : place + 1]


def target(batch, units, group, sample, level):
    """The noise e, and v = e - x_0."""
    latents, sigma = unit(units, group, sample, level)
    clean = batch.trajectories.samples[SAMPLES * group + sample]
    noise = (latents[0] - (1 - sigma) * clean) / sigma
    return noise, noise - clean


def mean(numbers):
    return sum(numbers) / len(numbers)


def square(vector):
    return mean([entry**2 for entry in vector])


@pytest.mark.parametrize("loss", ["weighted", "softplus"])
@pytest.mark.parametrize("clip", [None, 1e-2])
def test_dgpo_is_its_formula(loss, clip):
    policy, old, reference = trio()
    batch, beta, kl = batch_of(policy), 3.0, 0.2
    objective = DGPO(policy, reference, beta, loss, clip, kl=kl, levels=LEVELS, sigma_min=0.3)
    value, gradient, units = found(objective, old, batch)
    total, outside = 0.0, 0
    for group in range(len(PROMPTS)):
        for level in range(LEVELS):
            errors, margins, distances = [], [], []
            noise, _ = target(batch, units, group, 0, level)
            for sample, advantage in enumerate(advantages(group)):
                noise_of_sample, wanted = target(batch, units, group, sample, level)
                torch.testing.assert_close(noise_of_sample, noise)  # samples of a prompt share it
                mine, older, given = (weights.velocity(*unit(units, group, sample, level), None)[0] for weights in (policy, old, reference))
                error = square(mine - wanted)
                ratio = float((square(older - wanted) - error).detach().exp())
                if clip is not None and (ratio > 1 + clip if advantage > 0 else ratio < 1 - clip):
                    error, outside = error.detach(), outside + 1
                errors.append(advantage * error)
                margins.append(advantage * (error - square(given - wanted)))
                distances.append(square(mine - given))
            margin = beta * mean(margins)
            weighted = (1 / (1 + (-margin).exp())).detach() * mean(errors)
            preference = (1 + margin.exp()).log() if loss == "softplus" else weighted
            total = total + (preference + kl * mean(distances)) / (len(PROMPTS) * LEVELS)
    assert (outside > 0) == (clip is not None)
    assert value == pytest.approx(float(total.detach()), rel=1e-6)
    torch.testing.assert_close(gradient, derivative(policy, total), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("adaptive", [False, True])
def test_diffusion_nft_is_its_formula(adaptive):
    policy, old, reference = trio()
    batch, beta, limit, kl = batch_of(policy), 0.6, 1.2, 0.2
    objective = DiffusionNFT(policy, reference, beta, limit=limit, adaptive=adaptive, kl=kl, levels=LEVELS, sigma_min=0.1)
    value, gradient, units = found(objective, old, batch)
    total, cut = 0.0, 0
    for group in range(len(PROMPTS)):
        for sample, score in enumerate(advantages(group)):
            cut += abs(score) > limit
            share = 0.5 + max(-limit, min(limit, score)) / (2 * limit)
            for level in range(LEVELS):
                place = unit(units, group, sample, level)
                _, wanted = target(batch, units, group, sample, level)
                mine, older, given = (weights.velocity(*place, None)[0] for weights in (policy, old, reference))
                older = older.detach()
                each = []
                for direction in ((1 - beta) * older + beta * mine, (1 + beta) * older - beta * mine):
                    gap = direction - wanted
                    size = float(mean([abs(entry) for entry in gap]).detach())
                    each.append(float(place[1]) * square(gap) / size if adaptive else square(gap))
                unit_loss = share * each[0] + (1 - share) * each[1] + kl * square(mine - given)
                total = total + unit_loss / (len(PROMPTS) * SAMPLES * LEVELS)
    assert cut > 0
    assert value == pytest.approx(float(total.detach()), rel=1e-6)
    torch.testing.assert_close(gradient, derivative(policy, total), rtol=1e-6, atol=1e-9)
