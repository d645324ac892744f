"""A loop of tiny parts, and what its tests compare."""

import torch

from diffalign import AlignmentLoop, Prompt
from diffalign.core import Hook, Loss, Objective, Phase
from diffalign.prompts import Prompts
from diffalign.samplers import Branching, TreeSampler
from diffalign.testing import GivenPlan, channel_reward

PROMPTS = Prompts([Prompt("a red cube"), Prompt("two blue stars"), Prompt("three green disks"), Prompt("a grey cone")], shuffle=False)
TREE = TreeSampler(5, GivenPlan(Branching((1, 3, 1, 2, 1), (0.0, 0.7, 0.5, 1.0, 0.0))))


def sgd(lr):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


def build(objective, **options):
    options = {"optimizers": {"default": sgd(0.1)}, "prompts_per_step": 2, **options}
    return AlignmentLoop(
        objective, options.pop("sampler", TREE), options.pop("rewards", channel_reward), options.pop("prompts", PROMPTS), **options
    )


def weights(policy):
    return {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def flat(policy):
    return torch.cat([parameter.detach().flatten() for parameter in policy.trainable_parameters().values()])


def square(policy, scale=1.0):
    """scale / 2 times the squared norm of the weights: its gradient is scale times the weights."""
    return scale / 2 * sum(parameter.square().sum() for parameter in policy.trainable_parameters().values())


class Phased(Objective):
    """Phases given from outside; writes down what the loop calls."""

    def __init__(self, policy, *phases):
        self.policy, self._phases, self.events = policy, phases, []

    def phases(self):
        return self._phases

    def after_update(self, role):
        self.events.append(role)

    def after_step(self):
        self.events.append("step")


def phase(repeats=1, scale=1.0, **trains):
    def losses(batch, update):
        for policy in trains.values():
            yield Loss(square(policy, scale))

    return Phase(trains, losses, repeats)


class Recorder(Hook):
    def __init__(self, events, name="hook", on_step=lambda report: None):
        self.events, self.name, self.on_step = events, name, on_step

    def start(self, loop, step, total):
        self.events.append((self.name, "start", step, total))

    def step(self, loop, report):
        self.events.append((self.name, "step", report.step, report.total))
        self.on_step(report)

    def stop(self, loop, step, error):
        self.events.append((self.name, "stop", step, type(error).__name__))
