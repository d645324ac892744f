"""Prompts that ask for a size: policies follow it, in every family."""

import pytest
import torch
from tiny_pipelines import BUILD, built

from diffalign import Prompt
from diffalign.core import Edges, Guided, Progress, Streams, check_first_step, replay
from diffalign.policies import GaussianMixturePolicy, TDMPolicy
from diffalign.samplers import Branching, DeterministicSampler, TreeSampler
from diffalign.testing import GivenPlan

FAMILIES = ("sd3", "flux-dev", "flux2-klein", "z-image", "qwen-image", "sana", "sd15", "sdxl")
TREE = TreeSampler(4, GivenPlan(Branching((1, 2, 2, 1), (0.0, 0.7, 0.7, 0.0))))
WIDE = {"height": 32, "width": 64}


def sample(policy, size=None, sampler=TREE):
    prompts = [Prompt(text, size) for text in ("a red cube", "two cats")]
    with torch.no_grad():
        return sampler.sample(policy, policy.encode(prompts), Progress(0, 1), Streams(3))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_rollout_at_the_prompts_size_is_that_of_a_run_at_this_size(load, name):
    policy, wide = load(name), load(name, resolution=[32, 64])
    forest, expected = sample(policy, WIDE), sample(wide)
    assert torch.equal(forest.sigmas, expected.sigmas)
    assert torch.equal(forest.latents, expected.latents)
    assert forest.samples.shape[-1] == 2 * forest.samples.shape[-2]
    assert check_first_step(policy, forest).deviation == 0.0  # the policy replays what its view has drawn
    with torch.no_grad():
        assert torch.equal(policy.decode(forest.samples[:1]), wide.decode(expected.samples[:1]))
    assert policy.decode(forest.samples[:1]).shape[-2:] == (32, 64)
    assert torch.equal(sample(policy).latents, sample(load(name)).latents)  # and is as it was


def test_gradients_at_the_prompts_size_are_those_of_a_run_at_this_size(load):
    policy, wide = load("sdxl"), load("sdxl", resolution=[32, 64])
    forest = sample(wide)
    gradients = []
    for each in (policy, wide):
        replay(each, forest, Edges.of(forest)).mean.square().sum().backward()
        gradients.append([parameter.grad for parameter in each.trainable_parameters().values()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_a_view_shares_everything_but_the_shape(load):
    policy = load()
    view = policy.sized((32, 64))
    assert (policy.latent_shape, view.latent_shape) == ((4, 16, 16), (4, 16, 32))
    assert (policy.family.size, view.family.size) == ((32, 32), (32, 64))
    assert view.network is policy.network
    assert view.counter is policy.counter
    assert view.encodings is policy.encodings
    assert policy.sized(None) is policy
    assert policy.sized((32, 32)) is policy


def test_wrappers_pass_the_size_on(load):
    student = TDMPolicy(Guided(load("sd3"), 3.0), 4)
    expected = TDMPolicy(Guided(load("sd3", resolution=[32, 64]), 3.0), 4)
    ode = DeterministicSampler(4)
    assert torch.equal(sample(student, WIDE, ode).latents, sample(expected, sampler=ode).latents)
    assert student.sized(None) is student
    assert student.latent_shape == (4, 16, 16)
    assert student.sized((32, 64)).latent_shape == student.sized((32, 64)).policy.latent_shape == (4, 16, 32)


def test_a_student_keeps_its_own_grid(load):
    student = TDMPolicy(load(resolution=128), 4)
    assert not torch.equal(load().sigmas(4), student.sigmas(4))
    assert torch.equal(sample(student, WIDE, DeterministicSampler(4)).sigmas, student.sigmas(4))


def test_sizes_that_cannot_be_drawn_are_refused(load):
    with pytest.raises(ValueError, match=r"resolution must have sides divisible by 4 for a FluxPipeline; got 32 x 34 \(height x width\)"):
        load().sized((32, 34))
    pipeline = built(BUILD["sd3"])
    policy = load("sd3")
    positions = pipeline.transformer.config.pos_embed_max_size * pipeline.transformer.config.patch_size
    side = positions * pipeline.vae_scale_factor
    assert policy.sized((32, side)).latent_shape[-1] == positions
    with pytest.raises(ValueError, match=rf"resolution must have sides of at most {side} for this model.*got 32 x {side + 4}"):
        policy.sized((32, side + 4))
    mixture = GaussianMixturePolicy([[0.0, 1.0]], 0.3)
    with pytest.raises(ValueError, match=r"GaussianMixturePolicy draws images of one size only, but a prompt asks for 32 x 64"):
        sample(mixture, WIDE)


def test_one_rollout_has_one_size(load):
    policy = load()
    condition = policy.encode([Prompt("a", WIDE), Prompt("b")])
    with pytest.raises(ValueError, match=r"must ask for one size; these ask for 32 x 64 \(height x width\) and the run's own"):
        TREE.sample(policy, condition, Progress(0, 1), Streams(0))
