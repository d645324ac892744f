"""Log-ratios of finished samples by denoising errors: bias and variance of the estimate, by what lowers it, on a mixture in closed form.

The policy is a mixture of three Gaussians in two dimensions, moved from a reference of equal scale; the samples are its own. Every rule
takes the same number of network rows. Printed for each: the mean error against the exact log-ratio, the slope of the estimates over the
exact values, and the standard deviation of an estimate alone and of its difference to the mean of its group, which trajectory balance
uses; all in nats. "own noise" gives the reference another noise than the policy, which no option does.

Args:
    rows: network rows of an estimate, a multiple of 2
    repeats: estimates of each sample
    samples: samples of each of 8 prompts
    sigma_min: least noise level
"""

import math

import attrs
import torch
from torch import Tensor

from diffalign import Prompt
from diffalign.core import Progress, ScoredBatch, Streams, group_mean
from diffalign.objectives import ELBO
from diffalign.objectives.elbo import Estimates
from diffalign.objectives.forward import ForwardBatch
from diffalign.policies import GaussianMixturePolicy
from diffalign.samplers import DeterministicSampler

MODES = torch.tensor([[-1.5, 0.0], [1.5, 0.0], [0.0, 1.0]], dtype=torch.float64)


def log_density(policy: GaussianMixturePolicy, points: Tensor) -> Tensor:
    """Exact log p of clean samples [K, 2]: [K]."""
    squares = (points[:, None] - policy.means).square().sum(dim=-1)
    variance = policy.scale**2
    return (policy.log_weights.log_softmax(0) - squares / (2 * variance)).logsumexp(-1) - math.log(2 * math.pi * variance)


@torch.no_grad()
def main(rows: int = 8, repeats: int = 32, samples: int = 8, sigma_min: float = 0.02) -> None:
    policy, reference = GaussianMixturePolicy(MODES + 0.2, 0.6, [0.5, 0.3, 0.2]), GaussianMixturePolicy(MODES, 0.6)
    forest = DeterministicSampler(20, samples=samples).sample(policy, policy.encode([Prompt("a")] * 8), Progress(0, 1), Streams(1))
    rewards = forest.samples[:, 0]
    batch = ScoredBatch(forest, rewards, {"r": rewards}, 8, Progress(0, 1), Streams(2))
    exact = log_density(policy, forest.samples) - log_density(reference, forest.samples)
    plain = ELBO(levels=rows, sigma_min=sigma_min, shared=False, antithetic=False, stratified=False)
    rules = {
        "plain": plain,
        "shared": attrs.evolve(plain, shared=True),
        "stratified": attrs.evolve(plain, stratified=True),
        "antithetic": attrs.evolve(plain, antithetic=True, levels=rows // 2),
        "stratified, antithetic": attrs.evolve(plain, stratified=True, antithetic=True, levels=rows // 2),
        "all three": ELBO(levels=rows // 2, sigma_min=sigma_min, shared=True),
    }
    print(f"exact log-ratio: mean {float(exact.mean()):.3f}, std {float(exact.std()):.3f} nats; {rows} rows an estimate")
    print(f"{'rule':24s} {'bias':>8s} {'slope':>7s} {'std':>7s} {'std in group':>13s}")
    for name, bound in rules.items():
        forward = ForwardBatch(Estimates(bound, repeats)(batch, name, "study"), None)
        baseline, error = forward.errors(reference, "reference"), forward.errors(policy, "policy")
        show(name, bound.log_ratio(forward, baseline, error), exact, forest.group)
        if name == "plain":
            again = ForwardBatch(Estimates(bound, repeats)(batch, "own", "study"), None)
            unshared = bound.log_ratio(again, again.errors(reference, "reference"), torch.zeros_like(error))
            unshared = unshared + bound.log_ratio(forward, torch.zeros_like(error), error)
            show("plain, own noise", unshared, exact, forest.group)


def show(name: str, found: Tensor, exact: Tensor, group: Tensor) -> None:
    gap = found - exact
    inside = torch.stack([one - group_mean(one, group) for one in gap])
    slope = (exact * found.mean(dim=0)).sum() / exact.square().sum()
    numbers = (gap.mean(), slope, gap.std(dim=0).mean(), inside.std(dim=0).mean())
    print(f"{name:24s} {numbers[0]:8.3f} {numbers[1]:7.3f} {numbers[2]:7.3f} {numbers[3]:13.3f}", flush=True)
