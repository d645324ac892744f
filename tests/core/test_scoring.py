"""Rewards are called once per chunk, and whatever is not one finite number per image is refused with its address."""

import functools

import pytest
import torch

from diffalign import Prompt
from diffalign.core import RewardError, score
from diffalign.core.scoring import named_rewards, reward_name
from diffalign.testing import ConstantReward, channel_reward

IMAGES = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
PROMPTS = [Prompt(text) for text in ("a", "b", "c", "d")]


def test_scores_come_by_name_as_float32():
    scores = score({"bright": channel_reward, "one": ConstantReward(2.0)}, IMAGES, PROMPTS)
    torch.testing.assert_close(scores["bright"], channel_reward(IMAGES, PROMPTS))
    assert scores["one"].tolist() == [2.0] * 4
    assert all(values.dtype == torch.float32 for values in scores.values())


@pytest.mark.parametrize("result", [[1, 2, 3, 4], torch.tensor([1, 2, 3, 4]), torch.tensor([1.0, 2, 3, 4]).double(), (1.0, 2.0, 3.0, 4.0)])
def test_any_four_numbers_serve(result):
    assert score({"r": lambda images, prompts: result}, IMAGES, PROMPTS)["r"].tolist() == [1.0, 2.0, 3.0, 4.0]


def test_no_gradient_is_taken():
    images, modes = IMAGES.clone().requires_grad_(), []
    score({"r": lambda images, prompts: modes.append(torch.is_grad_enabled()) or [0.0] * 4}, images, PROMPTS)
    assert modes == [False]
    assert not score({"bright": channel_reward}, images, PROMPTS)["bright"].requires_grad
    assert not score({"r": lambda images, prompts: torch.ones(4, requires_grad=True)}, images, PROMPTS)["r"].requires_grad


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            lambda images, prompts: torch.ones(4, 1),
            r"r returned shape \(4, 1\) for 4 images; a reward must return one number per image, shape \(4,\).",
        ),
        (lambda images, prompts: 1.0, r"r returned shape \(\) for 4 images"),
        (lambda images, prompts: [1.0, 2.0], r"r returned shape \(2,\) for 4 images"),
        (lambda images, prompts: [1.0, 2.0, float("nan"), 4.0], r"r returned nan for image 2 of 4, prompt 'c'"),
        (lambda images, prompts: [1.0, float("-inf"), float("nan"), 4.0], r"r returned -inf for image 1 of 4, prompt 'b'"),
        (lambda images, prompts: ["good"] * 4, r"reward 'r' must return numbers, shape \(4,\); got list"),
        (lambda images, prompts: None, r"reward 'r' must return numbers, shape \(4,\); got NoneType"),
        (lambda images, prompts: 1 / 0, r"reward 'r' raised ZeroDivisionError for 4 images: division by zero"),
    ],
)
def test_anything_else_is_refused_with_its_address(reward, message):
    with pytest.raises(RewardError, match=f"^{message}"):
        score({"r": reward}, IMAGES, PROMPTS)


def test_the_cause_of_a_failing_reward_is_kept():
    with pytest.raises(RewardError) as caught:
        score({"r": lambda images, prompts: prompts[9]}, IMAGES, PROMPTS)
    assert isinstance(caught.value.__cause__, IndexError)


def test_an_interrupt_in_a_reward_is_not_swallowed():
    def interrupted(images, prompts):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score({"r": interrupted}, IMAGES, PROMPTS)


def test_a_single_reward_goes_by_its_own_name():
    assert list(named_rewards(channel_reward)) == ["channel_reward"]
    assert list(named_rewards(ConstantReward())) == ["ConstantReward"]
    assert reward_name(functools.partial(channel_reward)) == "partial"
    assert list(named_rewards({"a": channel_reward, "b": ConstantReward()})) == ["a", "b"]


def test_no_reward_and_what_cannot_be_called_are_refused():
    with pytest.raises(ValueError, match="rewards must name at least one reward; got none"):
        named_rewards({})
    with pytest.raises(ValueError, match=r"rewards\['a'\] must be callable with \(images, prompts\); got float"):
        named_rewards({"a": 1.0})


@pytest.mark.parametrize("name", ["", "group_std", "b/any"])
def test_names_that_metrics_cannot_carry_are_refused(name):
    with pytest.raises(ValueError, match=f"rewards must have names that metrics can carry, .*; got {name!r}"):
        named_rewards({name: channel_reward, "b": channel_reward})
