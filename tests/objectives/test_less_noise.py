"""Options of Softmax-TB that promise the same gradient with less noise, on a policy in closed form."""

import math

import pytest
import torch

from diffalign import Prompt
from diffalign.core import CPS, Progress, ScoredBatch, Streams
from diffalign.objectives import SoftmaxTB
from diffalign.policies import GaussianMixturePolicy
from diffalign.samplers import ChainSampler, FixedPlan, TreeSampler

BATCHES, PROMPTS = 60, 4
ANGLES = torch.arange(8, dtype=torch.float64) * math.pi / 4
MODES = torch.stack([4 * ANGLES.cos(), 4 * ANGLES.sin()], dim=1)
TREE = TreeSampler(8, FixedPlan((0, 1, 2), branches=3, eta=0.9))
CHAINS = ChainSampler(8, samples=9)


def moved(by):
    """A policy, and the reference that it has moved away from."""
    reference = GaussianMixturePolicy(MODES, 0.3, kernel=CPS("sum"))
    generator = torch.Generator().manual_seed(0)
    means = MODES + by * torch.randn(8, 2, generator=generator, dtype=torch.float64)
    policy = GaussianMixturePolicy(means, 0.3, 1 + torch.rand(8, generator=generator, dtype=torch.float64), kernel=CPS("sum"))
    return policy, reference.fork()


def gradients(sampler, by, beta, forms):
    """Of each form on the same batches: name -> [BATCHES, parameters]."""
    policy, reference = moved(by)
    objectives = {name: SoftmaxTB(policy, reference, beta=beta, clip=None, **options) for name, options in forms.items()}
    found = {name: [] for name in forms}
    for seed in range(BATCHES):
        with torch.no_grad():
            forest = sampler.sample(policy, policy.encode([Prompt("a")] * PROMPTS), Progress(0, 1), Streams(seed, 0))
        near = torch.cdist(forest.samples, MODES).min(dim=1)
        rewards = ((near.indices % 2 == 0) & (near.values < 1.5)).double()
        batch = ScoredBatch(forest, rewards, {"r": rewards}, PROMPTS, Progress(0, 10), Streams(seed, 0))
        for name, objective in objectives.items():
            (phase,) = objective.phases()
            parameters = list(policy.parameters())
            parts = [torch.autograd.grad(loss.value, parameters) for loss in phase.losses(batch, 0)]
            found[name].append(sum(torch.cat([part.flatten() for part in each]) for each in parts))
    return {name: torch.stack(rows) for name, rows in found.items()}


def gap(one, other):
    """Root mean square over parameters of the mean difference, in its standard errors: about 1 where there is none."""
    difference = one - other
    return float((difference.mean(dim=0) / (difference.std(dim=0) / BATCHES**0.5).clamp(min=1e-12)).square().mean().sqrt())


def noise(rows):
    return float(rows.var(dim=0).sum())


@pytest.mark.parametrize("options", [{}, {"level_weights": True}], ids=repr)
@pytest.mark.parametrize(("sampler", "by"), [(TREE, 1.2), (CHAINS, 0.6)], ids=["tree", "chains"])
def test_the_closed_pull_has_the_gradient_of_the_sampled_one_and_less_noise(sampler, by, options):
    got = gradients(sampler, by, 2.0, {"sampled": options, "closed": {**options, "pull": "closed"}})
    assert gap(got["closed"], got["sampled"]) < 1.6
    assert noise(got["closed"]) < 0.9 * noise(got["sampled"])


def test_siblings_have_the_gradient_of_level_weights():
    got = gradients(TREE, 1.2, 2.0, {"group": {"level_weights": True}, "siblings": {"center": "siblings"}, "shrunk": {}})
    assert gap(got["siblings"], got["group"]) < 1.6
    assert gap(got["shrunk"], got["group"]) > 2.5, "a bias of that size would be seen"


def test_chains_have_no_siblings_but_the_other_samples():
    """Of independent trajectories the others of the group are the baseline, which is what level weights make of its mean."""
    got = gradients(CHAINS, 0.6, 2.0, {"group": {"level_weights": True}, "siblings": {"center": "siblings"}})
    torch.testing.assert_close(got["siblings"], got["group"], rtol=1e-9, atol=1e-9)


def test_both_at_once():
    got = gradients(TREE, 1.2, 2.0, {"group": {"level_weights": True}, "both": {"center": "siblings", "pull": "closed"}})
    assert gap(got["both"], got["group"]) < 1.6
