"""Rewards around rewards: limits, thumbs, memory, threads; and that each passes on what the inner one needs."""

import threading
import time

import numpy as np
import pytest
import torch

from diffalign import Prompt
from diffalign.core import ConfigError, Partial, Reward, RewardError, score
from diffalign.core.demands import require
from diffalign.rewards import BinaryLiking, Cached, Clipped, Concurrent, WeightedSum
from diffalign.rewards.caching import _key

PROMPTS = [Prompt("a"), Prompt("b"), Prompt("c")]
IMAGES = torch.stack([torch.full((3, 4, 4), value) for value in (0.0, 0.5, 1.0)])


def brightness(images, prompts):
    return images.flatten(1).mean(dim=1)


def broken(images, prompts):
    return [float("nan")] * len(images)


class Counted(Reward):
    """Brightness; remembers how many images it was given, and needs a number in the metadata."""

    def __init__(self):
        self.asked = []

    def require(self, prompts):
        for prompt in prompts:
            if "number" not in prompt.metadata:
                raise ConfigError(f"Counted needs metadata 'number'; prompt {str(prompt)!r} has none")

    def __call__(self, images, prompts):
        self.asked.append(len(images))
        return brightness(images, prompts)


def test_clipped():
    assert Clipped(brightness, 0.25, 0.75)(IMAGES, PROMPTS).tolist() == [0.25, 0.5, 0.75]
    assert Clipped(brightness, high=0.25)(IMAGES, PROMPTS).tolist() == [0.0, 0.25, 0.25]
    assert Clipped(brightness, low=0.25)(IMAGES, PROMPTS).tolist() == [0.25, 0.5, 1.0]
    with pytest.raises(ValueError, match="needs low, high or both"):
        Clipped(brightness)
    with pytest.raises(ValueError, match="low must be below high; got 1 and 0"):
        Clipped(brightness, 1, 0)


def test_binary_liking_is_a_threshold():
    assert BinaryLiking(brightness, 0.5)(IMAGES, PROMPTS).tolist() == [0.0, 1.0, 1.0]
    assert BinaryLiking(brightness, 0.51)(IMAGES, PROMPTS).tolist() == [0.0, 0.0, 1.0]


def not_the_second(images, prompts):
    """Brightness, of no picture of the prompt "b"."""
    return Partial(brightness(images, prompts), torch.tensor([prompt != "b" for prompt in prompts]))


@pytest.mark.parametrize(
    ("around", "expected"),
    [(lambda r: Clipped(r, 0.25), [0.25, 1.0]), (lambda r: BinaryLiking(r, 0.75), [0.0, 1.0]), (Cached, [0.0, 1.0])],
)
def test_a_score_that_does_not_apply_stays_none_behind_a_wrapper(around, expected):
    wrapped = around(not_the_second)
    for _ in range(2):  # the second time from the cache
        part = score({"r": wrapped}, IMAGES, PROMPTS).partial("r")
        assert part.applies.tolist() == [True, False, True]
        assert part.scores.tolist() == expected
    every = wrapped(IMAGES[::2], PROMPTS[::2])
    assert isinstance(every, torch.Tensor)
    assert every.tolist() == expected


@pytest.mark.parametrize("kind", [WeightedSum, Concurrent])
def test_a_sum_takes_a_partial_score_of_every_picture(kind):
    wrapped = kind({"y": brightness, "x": lambda images, prompts: Partial(brightness(images, prompts), torch.ones(3, dtype=torch.bool))})
    assert wrapped(IMAGES, PROMPTS).tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("kind", [WeightedSum, Concurrent])
def test_a_sum_with_a_score_that_does_not_apply_is_refused_and_not_made_up(kind):
    said = rf"{kind.__name__}.rewards must apply to every picture; 'x' does not. Give the run the rewards by name"
    with pytest.raises(RewardError, match=said):
        score({"r": kind({"y": brightness, "x": not_the_second})}, IMAGES, PROMPTS)


@pytest.mark.parametrize("wrapped", [Clipped(broken, 0.0, 1.0), BinaryLiking(broken, 0.5), Cached(broken), Concurrent({"x": broken})])
def test_nan_is_an_error_behind_every_wrapper(wrapped):
    with pytest.raises(RewardError, match="returned nan for image 0 of 3"):
        wrapped(IMAGES, PROMPTS)


def test_cached_scores_what_is_new_and_nothing_else():
    inner = Counted()
    reward = Cached(inner)
    assert reward(IMAGES, PROMPTS).tolist() == [0.0, 0.5, 1.0]
    assert reward(IMAGES.flip(0), PROMPTS[::-1]).tolist() == [1.0, 0.5, 0.0]
    assert inner.asked == [3]
    twice = torch.cat([IMAGES[:1], IMAGES[:1] + 0.25, IMAGES[:1] + 0.25])
    assert reward(twice, [PROMPTS[0]] * 3).tolist() == [0.0, 0.25, 0.25]
    assert inner.asked == [3, 1]
    assert (reward.hits, reward.misses) == (5, 4)


def test_cached_tells_images_prompts_and_metadata_apart():
    inner = Counted()
    reward = Cached(inner)
    for image, prompt in (
        (IMAGES[:1], Prompt("a")),
        (IMAGES[:1], Prompt("A")),
        (IMAGES[:1], Prompt("a", {"number": 1})),
        (IMAGES[:1], Prompt("a", {"number": 2})),
        (IMAGES[:1] + 1e-7, Prompt("a")),
        (IMAGES[:1].reshape(1, 3, 2, 8), Prompt("a")),
    ):
        reward(image, [prompt])
    assert inner.asked == [1] * 6
    reward(IMAGES[:1], [Prompt("a", {"number": 2})])
    assert inner.asked == [1] * 6


@pytest.mark.parametrize("kind", [torch.tensor, np.array, lambda numbers: [numbers], lambda numbers: {"inside": torch.tensor(numbers)}])
def test_cached_tells_long_metadata_apart(kind):
    masks = [[0.0] * 2000 for _ in range(2)]
    masks[1][1000] = 400.0  # `repr` of an array leaves out its middle
    inner = Counted()
    reward = Cached(inner)
    for mask in (*masks, *masks):
        reward(IMAGES[:1], [Prompt("a", {"mask": kind(mask)})])
    assert inner.asked == [1, 1]


@pytest.mark.parametrize(
    ("one", "other"),
    [({"a": {}, "b": 1}, {"a": {"b": 1}}), ({1: "x"}, {"1": "x"}), ({"a": [1, [2]]}, {"a": [[1], 2]}), ({"a": 1}, {"a": True})],
)
def test_cached_tells_nested_metadata_apart(one, other):
    inner = Counted()
    reward = Cached(inner)
    for metadata in (one, other, one):
        reward(IMAGES[:1], [Prompt("a", {"nested": metadata})])
    assert inner.asked == [1, 1]


def test_cached_takes_equal_metadata_as_equal_and_whatever_else_there_is():
    inner = Counted()
    reward = Cached(inner)
    word = "".join(["r", "ed"])
    for words in (["red", "red"], [word, "".join(["re", "d"])]):
        reward(IMAGES[:1], [Prompt("a", {"words": words})])
    assert inner.asked == [1]
    lonely = Prompt("a \ud800", {"call": len, "open": lambda: 1})
    assert reward(IMAGES[1:2], [lonely]).tolist() == reward(IMAGES[1:2], [lonely]).tolist() == [0.5]
    assert inner.asked == [1, 1]
    assert reward(IMAGES[:0], []).tolist() == []


def test_cached_forgets_what_was_used_longest_ago():
    inner = Counted()
    reward = Cached(inner, size=2)
    for place in (0, 1, 0, 2, 0, 1):
        reward(IMAGES[place : place + 1], PROMPTS[place : place + 1])
    assert inner.asked == [1, 1, 1, 1]  # 0, 1, 2, and 1 once more
    assert len(reward._scores) == 2


def test_a_failed_score_is_not_remembered():
    answers = iter([broken, brightness])
    reward = Cached(lambda images, prompts: next(answers)(images, prompts))
    with pytest.raises(RewardError):
        reward(IMAGES, PROMPTS)
    assert reward(IMAGES, PROMPTS).tolist() == [0.0, 0.5, 1.0]


def test_concurrent_rewards_run_together_and_sum_as_one_after_the_other():
    meeting = threading.Barrier(3, timeout=20)

    def meets(factor):
        def reward(images, prompts):
            meeting.wait()  # breaks unless all three are inside at the same time
            assert not torch.is_grad_enabled()
            return factor * brightness(images, prompts)

        return reward

    rewards = {"one": meets(1.0), "ten": meets(10.0), "hundred": meets(100.0)}
    weights = {"one": 1.0, "ten": 0.5, "hundred": -1.0}
    together = Concurrent(rewards, weights)
    alone = WeightedSum(
        {name: lambda i, p, f=f: f * brightness(i, p) for name, f in zip(rewards, (1.0, 10.0, 100.0), strict=True)}, weights
    )
    assert torch.equal(together(IMAGES, PROMPTS), alone(IMAGES, PROMPTS))
    parts = together.parts(IMAGES, PROMPTS)
    assert list(parts) == ["one", "ten", "hundred"]
    assert parts["ten"].tolist() == [0.0, 5.0, 10.0]


def test_concurrent_names_the_reward_that_failed_after_all_are_done():
    done = []

    def slow(images, prompts):
        time.sleep(0.2)
        done.append(True)
        return brightness(images, prompts)

    def fails(images, prompts):
        raise KeyError("box")

    with pytest.raises(RewardError, match="reward 'bad' raised KeyError for 3 images"):
        Concurrent({"bad": fails, "slow": slow})(IMAGES, PROMPTS)
    assert done == [True], "no thread is left behind"
    with pytest.raises(ValueError, match="'b' is in only one"):
        Concurrent({"a": slow}, {"a": 1.0, "b": 1.0})
    with pytest.raises(ValueError, match="at least one"):
        Concurrent({})


@pytest.mark.parametrize(
    "wrap",
    [
        lambda reward: reward,
        lambda reward: Clipped(reward, 0.0),
        lambda reward: BinaryLiking(reward, 0.5),
        lambda reward: Cached(reward),
        lambda reward: Concurrent({"x": brightness, "y": reward}),
        lambda reward: WeightedSum({"x": brightness, "y": Clipped(Cached(reward), 0.0)}),
    ],
)
def test_what_a_reward_needs_is_known_through_every_wrapper(wrap):
    reward = wrap(Counted())
    require([brightness, reward], [Prompt("a", {"number": 1})])
    with pytest.raises(ConfigError, match="Counted needs metadata 'number'; prompt 'b' has none"):
        require([brightness, reward], [Prompt("a", {"number": 1}), Prompt("b")])


def test_cached_tells_sources_apart_and_keeps_the_keys_of_prompts_without_one():
    class OfSource(Reward):
        def __call__(self, images, prompts):
            return torch.tensor([float(len(prompt.source or "")) for prompt in prompts])

    reward = Cached(OfSource())
    prompts = [Prompt("a", source="faces"), Prompt("a", source="pens"), Prompt("a"), Prompt("a", source="faces")]
    assert reward(IMAGES[:1].repeat(4, 1, 1, 1), prompts).tolist() == [5.0, 4.0, 0.0, 5.0]
    assert (reward.hits, reward.misses) == (1, 3)
    image = torch.arange(12.0).reshape(3, 2, 2)
    keys = [_key(image, prompt).hex()[:16] for prompt in ("a", Prompt("a"), Prompt("a", {"n": 1}))]
    assert keys == ["b1df41f49d292d31", "b1df41f49d292d31", "f3ff010f1ca732b1"]
