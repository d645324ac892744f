"""The contract of rewards for a reward that does not apply to every picture."""

import math

import pytest
import torch

from diffalign.core import Partial
from diffalign.testing import check_reward, measure_reward
from diffalign.testing.properties import examine
from diffalign.testing.reward_contract import REWARD, cases


def brightness(images):
    return images.mean(dim=(1, 2, 3))


def red(images, prompts):
    """Applies to captions of one thing alone, whatever the place holds elsewhere."""
    applies = torch.tensor([" one " not in f" {prompt} " for prompt in prompts], device=images.device)
    return Partial(torch.where(applies, brightness(images), torch.full_like(brightness(images), math.nan)), applies)


def findings(reward):
    return {found.name: found for found in examine(cases(reward), REWARD)}


def test_a_partial_reward_keeps_the_contract():
    assert not [str(found) for found in check_reward(red) if found.skipped]


@pytest.mark.parametrize(
    ("reward", "broken", "words"),
    [
        (
            lambda images, prompts: Partial(brightness(images), brightness(images) >= brightness(images).mean()),
            "images apart",
            "one by one the reward applies to others: ",
        ),
        (
            lambda images, prompts: Partial(brightness(images), torch.arange(len(images), device=images.device) % 2 == 0),
            "order of images",
            "in another order the reward applies to others: ",
        ),
        (
            lambda images, prompts: Partial(brightness(images), torch.rand(len(images), device=images.device) > 0.5),
            "repeatable",
            "in a second call the reward applies to others: ",
        ),
        (
            lambda images, prompts: Partial(brightness(images) - brightness(images).mean(), red(images, prompts).applies),
            "images apart",
            "one by one it differs by ",
        ),
        (
            lambda images, prompts: Partial(torch.ones_like(brightness(images)), red(images, prompts).applies),
            "tells images apart",
            "6 different images all get 1",
        ),
    ],
)
def test_a_faulty_partial_reward_is_found(reward, broken, words):
    assert words in findings(reward)[broken].failure


def test_too_few_pictures_with_a_score_are_said():
    def one(images, prompts):
        return Partial(brightness(images), torch.tensor([prompt == "one blue square" for prompt in prompts], device=images.device))

    def none(images, prompts):
        return Partial(brightness(images), torch.zeros(len(images), dtype=torch.bool, device=images.device))

    found = findings(none)
    assert not [str(known) for known in found.values() if known.failure]
    assert "applies to 0 of these 8 pictures, and this needs 1; give check_reward `images` and `prompts`" in found["repeatable"].skipped
    assert found["images unchanged"].skipped == ""
    assert "this needs 2" in found["tells images apart"].skipped
    assert "too few scores to measure, applies to 0% of the images" in str(measure_reward(none))
    assert not findings(one)["order of images"].skipped


def test_what_applies_is_measured():
    measured = measure_reward(red)
    assert measured.applies == 0.75
    assert measured.noise == 0
    assert ", no noise, applies to 75% of the images, " in str(measured)
