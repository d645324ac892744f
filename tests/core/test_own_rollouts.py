"""Rollouts of a user's own: a reward of the step gets the images in the order of the forests, and no reward is left out."""

import pytest
import torch
from loops import PROMPTS, build

from diffalign.core import Progress, Rollout, StepReward
from diffalign.core.joining import join
from diffalign.core.rollout import pieces
from diffalign.core.scores import Scores
from diffalign.objectives import SoftmaxTB
from diffalign.testing import TinyPolicy, channel_reward


class Judged(StepReward):
    """Scores as `channel_reward` does, for the whole step."""

    def __init__(self):
        self.sizes = []

    def of_step(self, images, prompts, group, progress):
        self.sizes.append(len(images))
        return channel_reward(images, prompts)

    def __call__(self, images, prompts):
        raise AssertionError("not in a step")


class InPieces(Judged):
    whole = False


class LastFirst(Rollout):
    """Decodes the last piece first, and one of them twice."""

    def __call__(self, condition, stages):
        forests = [stages.sample(piece) for piece in pieces(condition, 1)]
        list(stages.decode(forests[0]))  # as after a failure
        scored = {index: [stages.score(pictures) for pictures in stages.decode(forests[index])] for index in reversed(range(len(forests)))}
        return stages.joined(condition, forests, [found for index in range(len(forests)) for found in scored[index]])


class Forgetful(Rollout):
    def __call__(self, condition, stages):
        forests = [stages.sample(condition)]
        scores = [stages.score(pictures) for pictures in stages.decode(forests[0])]
        return join(condition, forests), Scores.joined(scores)


def scores_of(rollout, **rewards):
    loop = build(SoftmaxTB(TinyPolicy()), rewards=rewards, rollout=rollout, prompts_per_step=3)
    return loop.step(PROMPTS.draw(0, 3), Progress(0, 1)).batch.parts.parts


def test_images_follow_the_forests_and_not_the_order_in_which_they_were_decoded():
    judged = Judged()
    found = scores_of(LastFirst(), judged=judged, plain=channel_reward)
    assert judged.sizes == [18]
    assert torch.equal(found["judged"], found["plain"])
    assert len(set(found["plain"].tolist())) > 6


def test_a_reward_that_needs_the_step_alone_is_asked_by_piece():
    judged = InPieces()
    found = scores_of(LastFirst(), judged=judged, plain=channel_reward)
    assert judged.sizes == [6] * 3
    assert torch.equal(found["judged"], found["plain"])


def test_a_rollout_that_leaves_a_reward_out_is_refused():
    with pytest.raises(ValueError, match=r"a Rollout must give the scores of all rewards; it lacks judged\. End it with `stages.joined`\."):
        scores_of(Forgetful(), judged=Judged(), plain=channel_reward)
    assert set(scores_of(Forgetful(), plain=channel_reward)) == {"plain"}
