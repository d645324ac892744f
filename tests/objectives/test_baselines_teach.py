"""Every baseline raises the mass of the rewarded modes of a ring, in closed form."""

import math

import pytest
import torch

from diffalign import AlignmentLoop, Prompt
from diffalign.core import CPS, Progress, Streams
from diffalign.objectives import DGPO, DiffusionNFT, FlowGRPO
from diffalign.policies import GaussianMixturePolicy
from diffalign.prompts import Prompts
from diffalign.samplers import AdaptivePlan, ChainSampler, DeterministicSampler, ProgressPlan, TreeSampler

ANGLES = torch.arange(8) * math.pi / 4
MODES = torch.stack([4 * ANGLES.cos(), 4 * ANGLES.sin()], dim=1)
SAMPLES = DeterministicSampler(6, samples=8)
PROGRESS = ProgressPlan((0, 1, 2), (0, 2, 3), branches=2, eta=0.9, first=0, promote_roots=True)
ADAPTIVE = AdaptivePlan(0.5, 1.0, branches=2, eta=0.9, first=0, roots=2)


def even_modes(images, prompts):
    distance, nearest = torch.cdist(16 * images[:, :2, 0, 0] - 8, MODES).min(dim=1)
    return ((nearest % 2 == 0) & (distance < 1.5)).float()


@pytest.mark.parametrize(
    ("make", "sampler"),
    [
        (lambda policy: FlowGRPO(policy, kl=0.0), ChainSampler(6, 8, eta=0.9, window=(0, 5))),
        (lambda policy: FlowGRPO(policy, kl=0.05, kl_in="reward"), TreeSampler(6, PROGRESS)),
        (lambda policy: FlowGRPO(policy, kl=0.01, ratio_norm=True, updates=2, clip=0.2), TreeSampler(6, ADAPTIVE)),
        (lambda policy: DiffusionNFT(policy), SAMPLES),
        (lambda policy: DGPO(policy, beta=1.0, sigma_min=0.0), SAMPLES),
    ],
    ids=["chains", "tree, progress", "tree, adaptive", "nft", "dgpo"],
)
def test_it_raises_the_reward(make, sampler):
    policy = GaussianMixturePolicy(MODES, scale=0.3, kernel=CPS("mean"))

    def mass():
        with torch.no_grad():
            forest = DeterministicSampler(12, samples=400).sample(policy, policy.encode([Prompt("a")]), Progress(0, 1), Streams(99))
            return float(even_modes(policy.decode(forest.samples), None).mean())

    before = mass()
    optimizers = {"policy": lambda parameters: torch.optim.Adam(parameters, lr=0.05)}
    loop = AlignmentLoop(make(policy), sampler, even_modes, Prompts(["a"]), prompts_per_step=8, optimizers=optimizers)
    loop.run(15)
    assert before == pytest.approx(0.5, abs=0.1)
    assert mass() > 0.6
