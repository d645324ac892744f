"""A policy around another one hands on everything that it does not change, in each of the package's wrappers."""

import inspect

import pytest
import torch
from torch import nn

from diffalign.core import Condition, Euler, Guided, Policy, PolicyAround, Prompt
from diffalign.policies import TDMPolicy
from diffalign.testing import BrokenReplay


class Peculiar(Policy):
    """Another answer than the default to every question that a policy is asked."""

    def __init__(self, latent_shape=(2,)):
        super().__init__(Euler(), latent_shape)
        self.own, self.shared = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))

    def encode(self, prompts):
        return Condition(tuple(prompts), torch.arange(len(prompts)), {"kind": torch.tensor([len(prompt) for prompt in prompts])})

    def encode_negative(self, text):
        return Condition((Prompt(text),), torch.tensor([0]), {"kind": torch.tensor([-1 - len(text)])})

    def decode(self, latents):
        return latents + 1

    def prior(self, noise):
        return noise + 2

    def sigmas(self, steps):
        return torch.linspace(0.5, 0, steps + 1)

    def velocity(self, latents, sigma, condition):
        self.counter.add(len(latents))
        return latents * condition.tensors["kind"][:, None]

    @property
    def no_guidance(self):
        return -1.0

    def guide(self, positive, negative, scale):
        return positive - scale * negative

    def sized(self, size):
        return self if size is None else Peculiar((size[0], size[1]))

    @property
    def precision(self):
        return torch.float16

    @property
    def device(self):
        return torch.device("meta")

    def own_parameters(self):
        return {"own": self.own}

    def fork(self, *, trainable=False, pristine=False):
        return Peculiar(self.latent_shape)


class Plain(PolicyAround):
    """Changes nothing."""

    def fork(self, *, trainable=False, pristine=False):
        return type(self)(self.policy.fork(trainable=trainable, pristine=pristine))


WRAPPERS = {
    "plain": Plain,
    "guided": lambda policy: Guided(policy, 2.0),
    "student": lambda policy: TDMPolicy(policy, 4),
    "slipped": lambda policy: BrokenReplay(policy, "sigma", 4),
}
LATENTS = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
PROMPTS = [Prompt("a red cube"), Prompt("two")]


@pytest.mark.parametrize("name", WRAPPERS)
def test_everything_else_is_that_of_the_policy_inside(name):
    inner = Peculiar()
    policy = WRAPPERS[name](inner)
    assert policy.policy is inner
    assert policy.counter is inner.counter
    assert policy.latent_shape == inner.latent_shape
    assert policy.kernel == inner.kernel
    assert policy.encode(PROMPTS).tensors["kind"].tolist() == [10, 3]
    assert policy.encode_negative("bad").tensors["kind"].tolist() == [-4]
    assert torch.equal(policy.decode(LATENTS), LATENTS + 1)
    assert torch.equal(policy.prior(LATENTS), LATENTS + 2)
    assert torch.equal(policy.sigmas(4), inner.sigmas(4))
    assert policy.no_guidance == -1.0
    assert torch.equal(policy.guide(LATENTS, LATENTS, 3.0), -2 * LATENTS)
    assert policy.precision == torch.float16
    assert policy.device == torch.device("meta")
    assert policy.own_parameters() == {"policy.own": inner.own}
    assert policy.sized(None) is policy
    larger = policy.sized((8, 4))
    assert type(larger) is type(policy)
    assert larger.latent_shape == larger.policy.latent_shape == (8, 4)
    assert policy.latent_shape == inner.latent_shape
    assert policy.policy is inner
    twin = policy.fork()
    assert type(twin) is type(policy)
    assert type(twin.policy) is Peculiar
    assert twin.policy is not inner


@pytest.mark.parametrize("name", ["plain", "student", "slipped"])
def test_the_velocity_is_that_of_the_policy_inside(name):
    inner = Peculiar()
    condition = inner.encode(PROMPTS)
    assert torch.equal(WRAPPERS[name](inner).velocity(LATENTS, torch.full((2,), 0.5), condition), LATENTS * torch.tensor([[10.0], [3.0]]))
    assert inner.counter.rows == 2


def test_no_answer_of_a_policy_is_forgotten():
    """A new method of `Policy` is handed on, or stands here because it is made of those that are."""
    derived = {"transition", "predict_clean", "trainable_parameters", "lerp_", "requires_grad_"}
    asked = {
        name for name, value in vars(Policy).items() if not name.startswith("_") and (inspect.isfunction(value) or type(value) is property)
    }
    handed_on = set(vars(PolicyAround)) | PolicyAround.__abstractmethods__
    assert asked - derived <= handed_on
    assert not derived & set(vars(PolicyAround))


def test_a_wrapper_that_does_not_say_how_it_is_forked_is_abstract():
    assert PolicyAround.__abstractmethods__ == {"fork"}


def test_a_student_is_told_its_steps_in_the_negative_text_too():
    policy = TDMPolicy(Peculiar(), 4, tag=" in {steps} steps")
    assert policy.encode_negative("bad").tensors["kind"].tolist() == [-1 - len("bad in 4 steps")]
