"""Students, batches and gradients for the tests of few-step objectives."""

from typing import Self

import attrs
import torch
from torch import nn

from diffalign import Prompt
from diffalign.core import CPS, ROOT, Condition, Policy, Progress, ScoredBatch, Streams, TrajectoryBatch, TrajectorySampler, score
from diffalign.policies import TDMPolicy
from diffalign.samplers import DeterministicSampler
from diffalign.testing import TinyPolicy, channel_reward

PROMPTS = [Prompt("a red cube"), Prompt("two blue stars"), Prompt("three green disks")]
GRID = [1.0, 0.9, 0.75, 0.5, 0.0]


def tiny_student(dtype=torch.float64, delta=0.0, **options):
    """A student that starts at its teacher, unless there is a delta."""
    return TDMPolicy(TinyPolicy((2, 2), dtype=dtype, delta=delta, **options), grid=lambda steps: torch.tensor(GRID, dtype=dtype))


def moved(policy, by=0.15):
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter += by
    return policy


def batch_of(policy, samples=4, prompts=PROMPTS, ids=None, streams=None, reward=channel_reward, groups=None, step=2):
    condition = policy.encode(prompts)
    if ids is not None:
        condition = Condition(condition.prompts, torch.tensor(ids), condition.tensors)
    streams = streams or Streams(1, step)
    with torch.no_grad():
        forest = DeterministicSampler(4, samples=samples).sample(policy, condition, Progress(step, 10), streams)
    texts = [prompts[index] for index in forest.group.tolist()]
    parts = score({"r": reward}, policy.decode(forest.samples), texts)
    return ScoredBatch(forest, parts["r"], parts, groups or len(prompts), Progress(step, 10), streams)


def gradients(objective, batch, update=0):
    """Role -> name -> gradient, of all losses of all phases together; None where there is none."""
    policies = {role: policy for phase in objective.phases() for role, policy in phase.trains.items()}
    for policy in policies.values():
        policy.zero_grad()
    for phase in objective.phases():
        for loss in phase.losses(batch, update):
            if loss.value.requires_grad:
                loss.value.backward()
    return {role: {n: p.grad for n, p in policy.trainable_parameters().items()} for role, policy in policies.items()}


def flat(named):
    return torch.cat([value.flatten() for value in named.values()])


def assert_same_gradients(got, expected, tolerance=1e-10):
    assert got.keys() == expected.keys()
    for role, named in expected.items():
        size = float(flat(named).norm())
        assert size > 1e-9, role
        assert float((flat(got[role]) - flat(named)).norm()) <= tolerance * size, role


class LinearPolicy(Policy):
    """A student in one step and closed form: from unit noise, x_0 = mean + scale * noise exactly.

    v(x, sigma) = (x - mean - scale * x) / sigma, so that its clean prediction is linear in the state.
    """

    def __init__(self, mean=(0.0,), scale=1.0):
        super().__init__(CPS(), (len(mean),))
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.scale = scale

    def encode(self, prompts):
        return Condition(tuple(prompts), torch.arange(len(prompts)), {})

    def decode(self, latents):
        """One pixel, its red the first coordinate."""
        return nn.functional.pad(latents[:, :1] / 16 + 0.5, (0, 2))[:, :, None, None]

    def prior(self, noise):
        return noise.double()

    def sigmas(self, steps):
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)

    def velocity(self, latents, sigma, condition):
        self.counter.add(len(latents))
        return (latents - self.mean - self.scale * latents) / sigma[:, None]

    def fork(self, *, trainable=False, pristine=False) -> Self:
        twin = type(self)(self.mean.tolist(), self.scale)
        twin.mean.requires_grad_(trainable)
        return twin


@attrs.frozen
class MirroredStage(TrajectorySampler):
    """One stage for one prompt, from noises that come in pairs of opposite sign: their mean is exactly 0.

    Args:
        samples: even
    """

    samples: int

    def sample(self, policy, condition, progress, streams):
        count = self.samples
        half = policy.prior(streams.normal((count // 2, *policy.latent_shape), "rollout", 0, 0))
        start, still = torch.cat([half, -half]), torch.zeros(count, dtype=torch.float64)
        end = policy.transition(start, still + 1, still, condition.select(still.long()), still).mean
        return TrajectoryBatch(
            condition=condition,
            sigmas=policy.sigmas(1),
            latents=torch.cat([start, end]),
            level=torch.arange(2).repeat_interleave(count),
            parent=torch.cat([torch.full((count,), ROOT), torch.arange(count)]),
            prompt=torch.zeros(2 * count, dtype=torch.long),
            noise_level=still.repeat(2),
            log_prob=still.repeat(2),
            mean=start[:0],
        )
