import pytest
import torch

from diffalign.core import Prompt, RewardError
from diffalign.rewards import JPEGCompressibility, WeightedSum

PROMPTS = [Prompt("a"), Prompt("b")]


def brightness(images, prompts):
    return images.flatten(1).mean(dim=1)


def length(images, prompts):
    return [float(len(prompt)) for prompt in prompts]


def test_weighted_sum_adds_raw_scores():
    images = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
    reward = WeightedSum({"bright": brightness, "long": length}, {"bright": 2.0, "long": 10.0})
    assert reward(images, PROMPTS).tolist() == [10.0, 12.0]
    assert WeightedSum({"bright": brightness, "long": length})(images, PROMPTS).tolist() == [1.0, 2.0]


def test_weighted_sum_refuses_weights_of_other_rewards():
    with pytest.raises(ValueError, match="'dark' is in only one"):
        WeightedSum({"bright": brightness}, {"bright": 1.0, "dark": 1.0})
    with pytest.raises(ValueError, match="at least one reward"):
        WeightedSum({})


def test_weighted_sum_checks_its_parts():
    reward = WeightedSum({"nothing": lambda images, prompts: torch.tensor([float("nan")] * len(images))})
    with pytest.raises(RewardError, match="nothing returned nan for image 0 of 2"):
        reward(torch.zeros(2, 3, 8, 8), PROMPTS)


def test_a_flat_picture_compresses_better_than_noise():
    noise = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    flat, noisy = JPEGCompressibility()(torch.stack([torch.full((3, 64, 64), 0.5), noise]), PROMPTS).tolist()
    assert flat > -1.0
    assert noisy < -5.0


def test_lower_quality_makes_smaller_files():
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert JPEGCompressibility(quality=20)(noise, PROMPTS[:1]) > JPEGCompressibility(quality=95)(noise, PROMPTS[:1])


def test_a_picture_with_nan_is_no_small_file():
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images[1, 0, 3, 4] = float("inf")
    with pytest.raises(ValueError, match="JPEGCompressibility needs images of finite numbers; image 1 of 2, prompt 'b', holds NaN"):
        JPEGCompressibility()(images, PROMPTS)
