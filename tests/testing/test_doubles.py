"""The doubles do what they say, for other tests rely on it."""

import pytest
import torch

from diffalign import Prompt
from diffalign.core import Progress, Streams
from diffalign.samplers import Branching, TreeSampler
from diffalign.testing import BrokenReplay, ConstantReward, GivenPlan, TinyPolicy, channel_reward

PROMPTS = [Prompt("a red cube"), Prompt("two blue stars")]


def test_the_velocity_of_a_tiny_policy_depends_on_latents_sigma_and_prompt():
    policy = TinyPolicy((2, 2))
    condition = policy.encode(PROMPTS)
    x, sigma, first = torch.ones(2, 2, 2), torch.tensor([0.5, 0.5]), torch.tensor([0, 0])
    base = policy.velocity(x, sigma, condition.select(first))
    torch.testing.assert_close(base[0], base[1])
    for other in (
        policy.velocity(x + 0.1, sigma, condition.select(first)),
        policy.velocity(x, sigma + 0.1, condition.select(first)),
        policy.velocity(x, sigma, condition.select(first + 1)),
    ):
        assert (other - base).abs().max() > 1e-3
    again = TinyPolicy((2, 2))
    assert torch.equal(again.velocity(x, sigma, again.encode([PROMPTS[0]] * 2)), base)
    assert not torch.equal(TinyPolicy((2, 2), seed=1).velocity(x, sigma, condition), base)


def test_a_tiny_policy_decodes_up_to_three_numbers_as_channels():
    assert TinyPolicy((2, 2)).decode(torch.zeros(5, 2, 2)).shape == (5, 3, 1, 1)
    assert TinyPolicy((2,)).decode(torch.zeros(1, 2)).flatten().tolist() == [0.5, 0.5, 0.0]


def test_checkpointing_changes_no_gradient():
    def gradient(checkpointing):
        policy = TinyPolicy(checkpointing=checkpointing)
        policy.velocity(torch.ones(2, 3), torch.tensor([0.5, 0.9]), policy.encode(PROMPTS)).square().sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in policy.trainable_parameters().values()])

    assert torch.equal(gradient(True), gradient(False))


def test_a_slipped_replay_is_right_for_one_rollout_and_wrong_afterwards():
    policy = TinyPolicy()
    slipped = BrokenReplay(policy, "sigma", 3)
    plan = GivenPlan(Branching((1, 2, 1), (0.0, 0.7, 0.0)))
    here = (policy.encode(PROMPTS), Progress(0, 1), Streams(0))
    with torch.no_grad():
        right, first, second = (TreeSampler(3, plan).sample(each, *here) for each in (policy, slipped, slipped))
    assert torch.equal(first.latents, right.latents)
    assert not torch.allclose(second.latents, right.latents, atol=1e-3)
    x, condition = torch.ones(2, 3), policy.encode(PROMPTS)
    sigmas = policy.sigmas(3)
    assert torch.equal(slipped.velocity(x, sigmas[[0, 1]], condition), policy.velocity(x, sigmas[[1, 2]], condition))
    assert torch.equal(slipped.decode(x), policy.decode(x))


def test_rewards_in_closed_form():
    images = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.0]])[:, :, None, None]
    assert channel_reward(images, ["ab", "abcd"]).tolist() == pytest.approx([0.95, -0.1])
    assert ConstantReward(0.3)(images, ["a", "b"]).tolist() == pytest.approx([0.3, 0.3])
