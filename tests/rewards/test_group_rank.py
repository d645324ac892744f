"""Ranks within the group: their formula, ties and holes, and that no schedule of a step or an evaluation cuts a group."""

import pytest
import torch

from diffalign import AlignmentLoop, Prompt
from diffalign.core import ConfigError, Overlapped, Partial, Progress, Reward, RewardError, Sequential, score
from diffalign.core.demands import require
from diffalign.evaluation import evaluate
from diffalign.objectives import SoftmaxTB
from diffalign.prompts import Mixture, Prompts, Source
from diffalign.rewards import Clipped, GroupRank, WeightedSum
from diffalign.samplers import FixedPlan, TreeSampler
from diffalign.testing import TinyPolicy, channel_reward

GROUP = torch.tensor([0, 1, 0, 1, 0, 2])
VALUES = torch.tensor([5.0, 7.0, -1.0, 7.0, 5.0, 3.0])
PROMPTS = [Prompt(text) for text in "abcdef"]
IMAGES = torch.zeros(6, 3, 2, 2)
TREE = TreeSampler(5, FixedPlan(splits=(1, 2)))


def given(images, prompts):
    return VALUES[: len(images)]


def test_ranks_go_from_0_to_1_and_equal_ones_share():
    # group 0: -1 < 5 = 5; group 1: 7 = 7; group 2 alone
    ranks = score({"rank": GroupRank(given)}, IMAGES, PROMPTS, GROUP)["rank"]
    assert ranks.tolist() == [0.75, 0.5, 0.0, 0.5, 0.75, 0.5]


def test_only_the_order_counts():
    bent = GroupRank(lambda images, prompts: (given(images, prompts) / 3).exp())
    torch.testing.assert_close(bent.of_groups(IMAGES, PROMPTS, GROUP), GroupRank(given).of_groups(IMAGES, PROMPTS, GROUP))


def test_a_picture_without_a_score_has_no_rank_and_is_no_rival():
    some = GroupRank(lambda images, prompts: Partial(VALUES, torch.tensor([True, True, True, True, False, True])))
    part = some.of_groups(IMAGES, PROMPTS, GROUP)
    assert part.applies.tolist() == [True, True, True, True, False, True]
    assert part.scores.tolist() == [1.0, 0.5, 0.0, 0.5, 0.5]


def test_without_groups_pictures_of_equal_prompts_are_one():
    prompts = [Prompt(text) for text in "ababac"]
    assert torch.equal(GroupRank(given)(IMAGES, prompts), GroupRank(given).of_groups(IMAGES, prompts, GROUP))


def test_it_passes_on_what_its_reward_needs():
    class Needing(Reward):
        def require(self, prompts):
            raise ConfigError("needs more")

        def __call__(self, images, prompts):
            return given(images, prompts)

    with pytest.raises(ConfigError, match="needs more"):
        require([GroupRank(Needing())], PROMPTS)


@pytest.mark.parametrize("around", [lambda inner: Clipped(inner, 0.0, 1.0), lambda inner: WeightedSum({"rank": inner})])
def test_inside_another_reward_it_cannot_know_its_groups(around):
    with pytest.raises(RewardError, match="scores all pictures of a prompt together, and here it cannot be known which they are"):
        score({"r": around(GroupRank(given))}, IMAGES, PROMPTS, GROUP)


def step(chunk, rollout, prompts=Prompts(["a", "a", "b"], shuffle=False)):  # noqa: B008  never changed
    rewards = {"plain": channel_reward, "rank": GroupRank(channel_reward)}
    loop = AlignmentLoop(SoftmaxTB(TinyPolicy()), TREE, rewards, prompts, prompts_per_step=3, chunk=chunk, rollout=rollout)
    return loop.step(prompts.draw(0, 3), Progress(0, 1))


@pytest.mark.parametrize("rollout", [Sequential(), Sequential(prompts=2), Overlapped(prompts=1), Overlapped(prompts=2, workers=2)])
@pytest.mark.parametrize("chunk", [1, 4, 9, 10, 100])
def test_no_chunk_cuts_a_group_and_equal_prompts_stay_groups_of_their_own(chunk, rollout):
    report = step(chunk, rollout)
    parts, group = report.batch.parts, report.batch.trajectories.group
    assert len(parts["rank"]) == 27
    for number in range(3):
        mine = group == number
        assert sorted(parts["rank"][mine].tolist()) == pytest.approx([place / 8 for place in range(9)])
        assert torch.equal(parts["rank"][mine].argsort(), parts["plain"][mine].argsort())
    assert len(report.images) == 16


def test_a_rank_of_one_source_ranks_within_it():
    mixture = Mixture({"one": Source(Prompts(["a"]), 2, ["plain"]), "two": Source(Prompts(["b"]), 1, ["plain", "rank"])})
    parts = step(4, Sequential(), mixture).batch.parts
    assert sorted(parts.partial("rank").scores.tolist()) == pytest.approx([place / 8 for place in range(9)])


@pytest.mark.parametrize("rows", [2, 5, 128])
def test_an_evaluation_ranks_all_samples_of_a_prompt(rows):
    result = evaluate(
        TinyPolicy(), PROMPTS[:3], {"plain": channel_reward, "rank": GroupRank(channel_reward)}, samples=4, steps=3, rows=rows
    )
    assert torch.equal(result.rewards["rank"].argsort(dim=1), result.rewards["plain"].argsort(dim=1))
    torch.testing.assert_close(result.rewards["rank"].sort(dim=1).values, (torch.arange(4) / 3).expand(3, 4))
