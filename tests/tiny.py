"""Batches of a network of a few weights, and the gradients of objectives on them."""

import torch

from diffalign import Prompt
from diffalign.core import ROOT, Progress, ScoredBatch, Streams, TrajectoryBatch
from diffalign.samplers import Branching, roll_out
from diffalign.testing import TinyPolicy

PROMPTS = [Prompt("a red cube"), Prompt("two blue stars")]
TREE = Branching((1, 3, 3, 1), (0.0, 0.7, 0.5, 0.0))
PROMOTED = Branching((1, 3, 1), (0.0, 0.7, 0.0), roots=3)


def pair(kernel=None, dtype=torch.float64):
    policy = TinyPolicy((2, 2), kernel=kernel, dtype=dtype)
    reference = policy.fork()
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter += 0.15
    return policy, reference


def batch_of(policy, branching=TREE, **options):
    with torch.no_grad():
        forest = roll_out(policy, policy.encode(PROMPTS), branching, Streams(1, 2), **options)
    rewards = forest.samples.flatten(1)[:, 0].detach().float()
    return ScoredBatch(forest, rewards, {"r": rewards}, 2, Progress(2, 10), Streams(1, 2))


def shuffled(forest):
    """The same forest with the last prompt first on some inner levels: parents of stochastic edges then do not rise."""

    def place_of(node):
        level, prompt = int(forest.level[node]), int(forest.prompt[node])
        return level, -prompt if level in (1, 3) else prompt

    order = sorted(range(len(forest.level)), key=place_of)
    order = torch.tensor(order)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    row = torch.full_like(order, -1)
    row[forest.stochastic] = torch.arange(len(forest.stochastic))
    parent = forest.parent[order]
    names = ("latents", "level", "prompt", "noise_level", "log_prob")
    return TrajectoryBatch(
        condition=forest.condition,
        sigmas=forest.sigmas,
        parent=torch.where(parent == ROOT, parent, place[parent.clamp(min=0)]),
        mean=forest.mean[row[order][row[order] >= 0]],
        **{name: getattr(forest, name)[order] for name in names},
    )


def gradient(objective, batch, update=0):
    (phase,) = objective.phases()
    parameters = list(objective.policy.trainable_parameters().values())
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for loss in phase.losses(batch, update):
        for place, part in enumerate(torch.autograd.grad(loss.value, parameters)):
            total[place] += part
    return torch.cat([part.flatten() for part in total])


def assert_same(got, expected, tolerance=1e-10):
    assert float(expected.norm()) > 1e-6
    assert float((got - expected).norm()) <= tolerance * float(expected.norm())
