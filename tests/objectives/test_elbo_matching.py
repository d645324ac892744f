"""Objectives over finished samples by the bound: their formulas, their fixed points, and what they may depend on."""

import zlib

import pytest
import torch
from chosen import PROMPTS, assert_gradient_is_of_the_whole, assert_two_steps_on_a_ring, batch_for
from ring import MODES, rewarded
from tiny import assert_same, gradient, pair

from diffalign.core import Progress, ScoredBatch, Streams, group_log_softmax, group_mean
from diffalign.objectives import ELBO, EffectiveSamples, ELBOGroupForwardKL, ELBOPolicyGradient, ELBOSoftmaxTB, KLBudget
from diffalign.objectives.elbo import Estimates
from diffalign.objectives.forward import ForwardBatch
from diffalign.policies import GaussianMixturePolicy
from diffalign.samplers import DeterministicSampler

ALL = [ELBOSoftmaxTB, ELBOGroupForwardKL, ELBOPolicyGradient]
BOUND = ELBO(levels=2, sigma_min=0.2)
FINE = ELBO(levels=400)
NAMES = {ELBOSoftmaxTB: "elbo_softmax_tb", ELBOGroupForwardKL: "elbo_group_forward_kl", ELBOPolicyGradient: "elbo_policy_gradient"}


def ratios(kind, policy, reference, batch, update=0):
    """Both estimates of each log-ratio to the reference, and to the weights as they are, with the draws of an update: [2, K] each."""
    samples = Estimates(BOUND)(batch, f"{NAMES[kind]}/{update}", "Mine")
    noised = samples.at(torch.arange(len(samples)))
    baseline, error = (noised.error(noised.velocity(weights)) for weights in (reference, policy))
    forward = ForwardBatch(samples, None)
    return BOUND.log_ratio(forward, baseline.detach(), error), BOUND.log_ratio(forward, error.detach(), error)


def derivative(policy, value):
    return torch.cat([part.flatten() for part in torch.autograd.grad(value, list(policy.trainable_parameters().values()))])


def test_trajectory_balance_has_the_gradient_of_the_centred_residual():
    policy, reference = pair()
    batch = batch_for(policy)
    (one, other), _ = ratios(ELBOSoftmaxTB, policy, reference, batch)
    group, rewards = batch.trajectories.group, batch.rewards.double()

    def residual(ratio):
        gap = group_log_softmax(ratio, group) - group_log_softmax(3.0 * rewards, group)
        return (gap - group_mean(gap, group)).detach()

    expected = derivative(policy, (residual(other) * one + residual(one) * other).mean() / 2)
    assert_same(gradient(ELBOSoftmaxTB(policy, reference, 3.0, BOUND), batch), expected)


def test_the_forward_kl_has_the_gradient_of_its_formula():
    policy, reference = pair()
    batch = batch_for(policy)
    (one, other), _ = ratios(ELBOGroupForwardKL, policy, reference, batch)
    group, target = batch.trajectories.group, group_log_softmax(3.0 * batch.rewards.double(), batch.trajectories.group).exp()
    pulls = ((group_log_softmax(fixed.detach(), group).exp() - target) * moving for moving, fixed in ((one, other), (other, one)))
    objective = ELBOGroupForwardKL(policy, reference, 3.0, BOUND)
    assert_same(gradient(objective, batch), derivative(policy, sum(pull.sum() for pull in pulls) / 2 / 3))
    (loss,) = objective.losses(batch, 0)
    own = group_log_softmax((one + other).detach() / 2, group)
    assert float(loss.value.detach()) == pytest.approx(float((target * (target.log() - own)).sum() / 3))


def test_the_policy_gradient_has_the_gradient_of_its_formula():
    policy, reference = pair()
    batch = batch_for(policy)
    drift, own = ratios(ELBOPolicyGradient, policy, reference, batch)
    group = batch.trajectories.group
    reward = batch.rewards.double() - 0.3 * drift.detach().flip(0)
    advantage = torch.stack([values - group_mean(values, group) for values in reward])
    objective = ELBOPolicyGradient(policy, reference, 0.3, BOUND)
    assert_same(gradient(objective, batch), derivative(policy, -(advantage * own).mean()))


def test_a_ratio_beyond_the_trust_region_has_no_gradient():
    policy, reference = pair()
    batch = batch_for(policy)
    group = batch.trajectories.group
    objective = ELBOPolicyGradient(policy, reference, 0.3, BOUND, updates=2)
    samples = Estimates(BOUND)(batch, "elbo_policy_gradient/0", "Mine")
    noised, forward = samples.at(torch.arange(len(samples))), ForwardBatch(samples, None)
    old = noised.error(noised.velocity(policy)).detach()
    with torch.no_grad():
        policy.network.lora_B.weight += 0.05
    error = noised.error(noised.velocity(policy))
    ratio = (BOUND.log_ratio(forward, old, error) / 4).exp()
    drift = BOUND.log_ratio(forward, noised.error(noised.velocity(reference)), error).detach()
    reward = batch.rewards.double() - 0.3 * drift.flip(0)
    advantage = torch.stack([values - group_mean(values, group) for values in reward])
    width = float((ratio.detach() - 1).abs().median())
    objective.clip = width
    value = 4 * torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - width, 1 + width)).mean()
    assert_same(gradient(objective, batch), derivative(policy, value))


def test_the_square_of_one_estimate_would_add_its_variance():
    """The mean of c c' is the square of the exact residual; that of c c is larger by the variance of c."""
    group = torch.arange(4).repeat_interleave(3)
    generator = torch.Generator().manual_seed(0)
    exact, logits = torch.randn(2, 12, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, 4000, 12, generator=generator, dtype=torch.float64)
    objective = ELBOSoftmaxTB(GaussianMixturePolicy(MODES, 0.3))
    crossed, squared = (
        torch.stack([objective._mismatch(exact + a, exact + b, logits, group) for a, b in pairs]).mean()
        for pairs in (zip(*noise, strict=True), zip(noise[0], noise[0], strict=True))
    )
    gap = exact - logits
    half = float((gap - group_mean(gap, group)).square().mean()) / 2
    assert float(crossed) == pytest.approx(half, abs=0.02)
    assert float(squared) == pytest.approx(half + 1 / 3, abs=0.02)  # 2/3 of the variance 1 is left by centring three


PLACES = torch.tensor([[-4.0, 0.0], [4.0, 0.0], [0.0, 5.0]], dtype=torch.float64)
SCORES = torch.tensor([0.0, 1.0, 0.5])


def score_of_mode(images, prompts):
    return SCORES.to(images)[torch.cdist(16 * images[:, :2, 0, 0] - 8, PLACES.to(images)).argmin(dim=1)]


class Quick(Streams):
    """Noise of all units of a call at once, the same whenever it is asked for: a test of a mean needs very many."""

    def normals(self, shape, name, prompt_ids, node_ids):
        return torch.randn(len(node_ids), *shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def pull(make, weights):
    """Mean gradient on the log-weights of a mixture with these weights, on its own samples; the reference has equal weights."""
    policy = GaussianMixturePolicy(PLACES, 0.5, weights)
    policy.means.requires_grad_(False)
    objective = make(policy, GaussianMixturePolicy(PLACES, 0.5).requires_grad_(False))
    with torch.no_grad():
        forest = DeterministicSampler(8, samples=12).sample(policy, policy.encode(PROMPTS * 2), Progress(0, 1), Streams(3))
        rewards = score_of_mode(policy.decode(forest.samples), None)
    return gradient(objective, ScoredBatch(forest, rewards, {"r": rewards}, 6, Progress(0, 1), Quick(4)))


@pytest.mark.parametrize(
    "make",
    [
        lambda policy, reference: ELBOSoftmaxTB(policy, reference, 2.0, FINE),
        lambda policy, reference: ELBOGroupForwardKL(policy, reference, 2.0, FINE),
        lambda policy, reference: ELBOPolicyGradient(policy, reference, 0.5, FINE),
    ],
    ids=["softmax tb", "forward kl", "policy gradient"],
)
def test_the_fixed_point_is_the_exact_tilt(make):
    """Weights of three far modes, of which a reward knows each: p_ref exp(2 R) / Z, from a rollout by a deterministic sampler."""
    betas = (0.0, 1.9, 2.0, 2.1, 4.0)
    at_start, below, at_tilt, above, beyond = (pull(make, (beta * SCORES.double()).softmax(0)) for beta in betas)
    assert float(at_tilt.norm()) < 0.01 * float(at_start.norm())
    assert at_start[1] < below[1] < 0 < above[1] < beyond[1]  # downhill leads to the tilt from both sides, and 5 % away it is seen


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_the_gradient_is_that_of_the_whole(kind):
    policy, reference = pair()
    assert_gradient_is_of_the_whole(lambda rows: kind(policy, reference, bound=BOUND, rows=rows))


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_rows_of_an_update_are_counted(kind):
    policy, reference = pair()
    objective = kind(policy, reference, bound=BOUND)
    batch, before = batch_for(policy), (policy.counter.rows, reference.counter.rows)
    gradient(objective, batch)
    assert policy.counter.rows - before[0] == reference.counter.rows - before[1] == 3 * objective.update_rows(4, 0) == 12 * 8


def test_a_budget_finds_the_temperature_and_is_kept():
    policy, reference = pair()
    objective = ELBOSoftmaxTB(policy, reference, KLBudget(1.0, start=5.0), BOUND)
    (loss,) = objective.losses(batch_for(policy), 0)
    metrics = {name: float(total) / float(count) for name, (total, count) in loss.metrics.items()}
    assert metrics["beta"] == pytest.approx(5.0)
    batch = batch_for(policy)
    assert metrics["log_ratio/reference"] == pytest.approx(float(ratios(ELBOSoftmaxTB, policy, reference, batch)[0].detach().mean()))
    objective.observe(metrics, batch.progress)
    other = ELBOSoftmaxTB(policy, reference, KLBudget(1.0, start=5.0), BOUND)
    other.restore(objective.state())
    (again,), (same,) = other.losses(batch, 0), objective.losses(batch, 0)
    assert float(again.metrics["beta"][0]) == float(same.metrics["beta"][0]) != 5.0


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_two_steps_on_a_ring(kind):
    assert_two_steps_on_a_ring(lambda policy: kind(policy, rows=7), DeterministicSampler(6, samples=4), MODES, rewarded)


def test_what_makes_no_sense_is_refused():
    policy, _ = pair()
    for kind in ALL:
        with pytest.raises(ValueError, match="reference must be frozen"):
            kind(policy, policy.fork(trainable=True))
    with pytest.raises(ValueError, match=r"ELBOSoftmaxTB\.beta must be positive and finite"):
        ELBOSoftmaxTB(policy, beta=0.0)
    with pytest.raises(ValueError, match="kl"):
        ELBOPolicyGradient(policy, kl=0.0)


@pytest.mark.parametrize("kind", [ELBOSoftmaxTB, ELBOGroupForwardKL])
def test_a_budget_of_nats_needs_a_bound_that_has_nats(kind):
    policy, _ = pair()
    with pytest.raises(ValueError, match=f"{kind.__name__}.beta: KLBudget counts nats, and errors weighted by 'flow' are none"):
        kind(policy, beta=KLBudget(nats=5.0), bound=ELBO(weighting="flow"))
    kind(policy, beta=KLBudget(nats=5.0))
    kind(policy, beta=EffectiveSamples(), bound=ELBO(weighting="flow"))
