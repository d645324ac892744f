"""Rewards inside rewards: what must be told groups or the step is refused where nobody can tell it."""

import attrs
import pytest
import torch

from diffalign import AlignmentLoop
from diffalign.core import GroupReward, Reward, StepReward
from diffalign.core.nesting import require_single, rewards_inside
from diffalign.core.scoring import OfSources, named_rewards
from diffalign.objectives import SoftmaxTB
from diffalign.rewards import BinaryLiking, Cached, Clipped, Concurrent, GroupRank, HPSv3PlusPlus, IterationRamp, WeightedSum
from diffalign.samplers import ChainSampler
from diffalign.testing import ConstantReward, TinyPolicy, channel_reward


class Ramp(StepReward):
    def of_step(self, images, prompts, group, progress):
        return torch.full((len(images),), progress.fraction)

    def __call__(self, images, prompts):
        return torch.zeros(len(images))


@attrs.frozen
class Forwards(StepReward):
    """Wrapper that is told the step and the groups, and passes them on."""

    reward: Reward

    def of_step(self, images, prompts, group, progress):
        return self.reward.of_step(images, prompts, group, progress)

    def __call__(self, images, prompts):
        return self.reward(images, prompts)


@attrs.frozen
class Ranks(GroupReward):
    reward: Reward

    def of_groups(self, images, prompts, group):
        return self.reward.of_groups(images, prompts, group)


class Mine:
    """Wrapper of a user, which is no subclass of anything."""

    def __init__(self, reward):
        self.reward = reward

    def __call__(self, images, prompts):
        return self.reward(images, prompts)


AROUND = {
    "Clipped": lambda inner: Clipped(inner, 0.0, 1.0),
    "Cached": Cached,
    "BinaryLiking": lambda inner: BinaryLiking(inner, 0.5),
    "WeightedSum": lambda inner: WeightedSum({"one": channel_reward, "two": inner}),
    "Concurrent": lambda inner: Concurrent({"one": channel_reward, "two": inner}),
    "Mine": Mine,
}


@pytest.mark.parametrize("name", [*AROUND, "GroupRank"])
def test_a_step_reward_inside_another_is_refused(name):
    """The wrapper scores it as an evaluation would, so a ramp would stay at its first value for the whole run."""
    around = {**AROUND, "GroupRank": GroupRank}[name]
    with pytest.raises(
        ValueError, match=rf"^rewards\['r'\] must not hold Ramp inside {name}, which cannot tell it which step is scored\. Name Ramp"
    ):
        named_rewards({"r": around(Ramp())})


@pytest.mark.parametrize("name", AROUND)
def test_a_group_reward_inside_another_is_refused(name):
    with pytest.raises(ValueError, match=rf"must not hold GroupRank inside {name}, which cannot tell it which pictures are of one prompt"):
        named_rewards({"r": AROUND[name](GroupRank(channel_reward))})


def test_it_is_found_at_any_depth_before_anything_is_drawn():
    deep = Cached(WeightedSum({"one": Clipped(Ramp(), 0.0, 1.0)}))
    assert [type(inside) for _, inside in rewards_inside(deep)] == [WeightedSum, Clipped, Ramp]
    with pytest.raises(ValueError, match="must not hold Ramp inside Clipped"):
        AlignmentLoop(SoftmaxTB(TinyPolicy()), ChainSampler(4, 3), {"r": deep}, ["a"])


def test_what_can_be_told_is_taken():
    ramp = IterationRamp(object.__new__(HPSv3PlusPlus))
    rewards = {
        "step": Ramp(),
        "rank": GroupRank(Clipped(channel_reward, 0.0, 1.0)),
        "ramp": ramp,
        "forwards": Forwards(Ramp()),
        "of groups": Forwards(GroupRank(channel_reward)),
        "ranks": Ranks(GroupRank(channel_reward)),
        "sum": WeightedSum({"one": ConstantReward()}),
        "of sources": OfSources(Ramp(), ("a",)),
    }
    assert named_rewards(rewards) == rewards


@pytest.mark.parametrize("reward", [Ramp(), GroupRank(channel_reward), Clipped(Ramp(), 0.0, 1.0), Mine(GroupRank(channel_reward))])
def test_what_needs_more_than_an_image_and_its_prompt_is_not_single(reward):
    with pytest.raises(ValueError, match=r"^It must score each image on its own; got (Ramp|GroupRank), which must .*\. Do this\.$"):
        require_single("It", reward, "Do this.")
    require_single("It", Clipped(channel_reward, 0.0, 1.0), "Do this.")
    require_single("It", channel_reward, "Do this.")
