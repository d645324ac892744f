"""Small runs with votes, and people who vote."""

import torch

from diffalign.core import AlignmentLoop
from diffalign.objectives import SoftmaxTB
from diffalign.samplers import ChainSampler
from diffalign.testing.doubles import TinyPolicy
from diffalign.voting import Simulated, Votes


def red(images, prompts):
    """A taste: more red than green."""
    colour = images.mean(dim=(2, 3))
    return (colour[:, 0] > colour[:, 1]).float()


def voted(voters=None, questions=4, **changed):
    return Votes(voters or Simulated(red), questions=questions, **changed)


def loop_of(votes, **changed):
    given = {
        "objective": SoftmaxTB(TinyPolicy(), beta=4.0),
        "sampler": ChainSampler(4, 6),
        "rewards": votes,
        "prompts": ["one", "two"],
        "prompts_per_step": 2,
        "optimizers": 1e-2,
    }
    return AlignmentLoop(**{**given, **changed})


def weights(loop):
    return torch.cat([parameter.detach().flatten() for parameter in loop.objective.policy.parameters()])
