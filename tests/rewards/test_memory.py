"""When memory runs out, batches are halved; for one image it is an error."""

import pytest
import torch

from diffalign import Prompt
from diffalign.core import ConfigError, Partial, RewardError
from diffalign.rewards import GroupRank
from diffalign.rewards.memory import HalvedBatches, is_out_of_memory

IMAGES = torch.rand(11, 3, 2, 2, generator=torch.Generator().manual_seed(0))
PROMPTS = [str(place) for place in range(11)]


class Small:
    """A scorer that holds a few images."""

    def __init__(self, holds, error):
        self.holds, self.error, self.sizes = holds, error, []

    def __call__(self, images, prompts):
        self.sizes.append(len(images))
        if len(images) > self.holds:
            raise self.error
        return images.mean(dim=(1, 2, 3)) + torch.tensor([float(prompt) for prompt in prompts])


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")])
@pytest.mark.parametrize("holds", [1, 2, 3, 5, 11])
def test_batches_are_halved_until_they_fit(error, holds):
    scorer = Small(holds, error)
    reward = HalvedBatches(scorer)
    expected = IMAGES.mean(dim=(1, 2, 3)) + torch.arange(11.0)
    torch.testing.assert_close(reward(IMAGES, PROMPTS), expected)
    failures = sum(size > holds for size in scorer.sizes)
    torch.testing.assert_close(reward(IMAGES, PROMPTS), expected)
    assert sum(size > holds for size in scorer.sizes) == failures  # what fits is remembered


def test_one_image_that_does_not_fit_is_an_error():
    with pytest.raises(RewardError, match="memory ran out for a single image of 2 x 2"):
        HalvedBatches(Small(0, MemoryError("full")))(IMAGES, PROMPTS)


def test_other_errors_pass():
    scorer = Small(0, ValueError("no"))
    with pytest.raises(ValueError, match="no"):
        HalvedBatches(scorer)(IMAGES, PROMPTS)
    assert scorer.sizes == [11]
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(RewardError("the worker: out of memory"))


def test_pieces_of_the_wrong_shape_are_refused():
    def odd(images, prompts):
        if len(images) > 6:
            raise MemoryError
        return torch.zeros(len(images), 1)

    with pytest.raises(RewardError, match=r"the shape for 5 images must be \(5,\); got \(5, 1\)"):
        HalvedBatches(odd)(IMAGES, PROMPTS)


def test_a_reward_that_must_see_whole_groups_is_not_cut():
    with pytest.raises(
        ValueError, match=r"^HalvedBatches\.reward must score each image on its own; got GroupRank, .*Put HalvedBatches inside"
    ):
        HalvedBatches(GroupRank(Small(2, MemoryError())))
    ranks = GroupRank(HalvedBatches(Small(2, MemoryError())))
    assert ranks(IMAGES[:4], PROMPTS[:4]).tolist() == [0.5] * 4


def test_what_the_reward_needs_is_passed_on():
    class Demanding(Small):
        def require(self, prompts):
            raise ConfigError(f"{len(prompts)} prompts without a target")

    with pytest.raises(ConfigError, match="11 prompts without a target"):
        HalvedBatches(Demanding(1, MemoryError())).require(PROMPTS)


def test_pieces_that_apply_to_some_pictures_alone_are_put_together():
    def picky(images, prompts):
        if len(images) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return Partial(images.mean(dim=(1, 2, 3)), images.mean(dim=(1, 2, 3)) > 0.5)

    images = torch.linspace(0, 1, 5)[:, None, None, None].expand(5, 3, 2, 2)
    part = HalvedBatches(picky)(images, [Prompt("a")] * 5)
    assert part.applies.tolist() == [False, False, False, True, True]
    assert part.scores.tolist() == [0.75, 1.0]
