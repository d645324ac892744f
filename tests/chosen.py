"""Batches of some prompts of a list, each with the draws that it has among all of them; and what must hold for every objective."""

import attrs
import pytest
import torch
from tiny import assert_same, gradient

from diffalign import AlignmentLoop, Prompt
from diffalign.core import Progress, ScoredBatch, Streams
from diffalign.policies import GaussianMixturePolicy
from diffalign.prompts import Prompts
from diffalign.samplers import Branching, roll_out

PROMPTS = [Prompt("a red cube"), Prompt("two blue stars"), Prompt("three green disks")]
SAMPLES = Branching((1,) * 6, (0.0,) * 6, roots=4)


def batch_for(policy, branching=SAMPLES, chosen=(0, 1, 2), groups=None, step=2):
    streams = Streams(1, step)
    with torch.no_grad():
        forest = roll_out(policy, policy.encode(PROMPTS).select(torch.tensor(chosen)), branching, streams)
    rewards = forest.samples.flatten(1)[:, 0].detach().float()
    return ScoredBatch(forest, rewards, {"r": rewards}, groups or len(chosen), Progress(step, 10), streams)


def assert_gradient_is_of_the_whole(make, branching=SAMPLES):
    """The gradient does not depend on chunking, on the order or the number of prompts, and is a mean over the global groups.

    Args:
        make: rows -> objective, of the same weights each time
        branching: of the rollout
    """
    policy = make(None).policy
    batch = batch_for(policy, branching)
    whole = gradient(make(None), batch)
    for rows in (1, 2, 5, 1000):
        assert_same(gradient(make(rows), batch), whole)
    alone = [gradient(make(2), batch_for(policy, branching, [index])) for index in range(3)]
    assert_same(sum(alone) / 3, whole)
    assert_same(gradient(make(3), batch_for(policy, branching, [2, 0, 1])), whole)
    assert_same(gradient(make(None), batch_for(policy, branching, groups=12)) * 4, whole)


def assert_standardised(make, branching=SAMPLES):
    """Rewards a R + b give the gradient of R for a > 0, and rewards -R its opposite where nothing else is in the loss.

    Args:
        make: -> objective without any term but the reward's, of the same weights each time
        branching: of the rollout
    """
    batch = batch_for(make().policy, branching)
    rewards = batch.rewards.double()
    whole = gradient(make(), attrs.evolve(batch, rewards=rewards))
    assert_same(gradient(make(), attrs.evolve(batch, rewards=3.0 * rewards - 7.0)), whole)
    assert_same(-gradient(make(), attrs.evolve(batch, rewards=-rewards)), whole)
    equal = gradient(make(), attrs.evolve(batch, rewards=torch.full_like(rewards, 0.7)))
    assert float(equal.norm()) <= 1e-12 * float(whole.norm())


def assert_two_steps_on_a_ring(make, sampler, modes, reward):
    """Two steps of a run in closed form have finite gradients that are not zero, and move the weights.

    Args:
        make: policy -> objective
        sampler: of the run
        modes: of the mixture
        reward: of the run
    """
    policy = GaussianMixturePolicy(modes, 0.3)
    before = policy.log_weights.detach().clone()
    loop = AlignmentLoop(
        make(policy),
        sampler,
        reward,
        Prompts(["left", "right", "up"]),
        prompts_per_step=2,
        optimizers={"default": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2)},
    )
    for step in range(2):
        report = loop.step(["left", "right"], Progress(step, 2))
        assert 0 < report.metrics["grad_norm/policy"] < float("inf")
        assert all(value == pytest.approx(value) for value in report.metrics.values())  # none is NaN
    assert float((policy.log_weights.detach() - before).abs().max()) > 1e-3
