"""Pictures that are not those of the session, and pictures that are none."""

import pytest
import torch
from sessions import loop_of, of_a_session, voted, weights

from diffalign.core import Progress, Prompt, RewardError
from diffalign.objectives import SoftmaxTB
from diffalign.testing.doubles import TinyPolicy
from diffalign.voting import Votes


class Rounding(TinyPolicy):
    """Decodes the first picture of a call one 8-bit step away, as a machine that rounds in another way may do with one in many."""

    def decode(self, latents):
        images = super().decode(latents).clone()
        images[0] += 1 / 255
        return images


def test_a_replay_in_which_one_picture_differs_is_refused(tmp_path):
    of_a_session(tmp_path, questions=12)
    loop = loop_of(Votes.replay(tmp_path / "votes.jsonl"), objective=SoftmaxTB(Rounding(), beta=4.0))
    with pytest.raises(RewardError, match="pictures of step 0 that this run does not draw: those of 1 of 12 questions"):
        loop.advance(1)


def test_a_session_that_began_anew_with_other_pictures_is_replayed(tmp_path):
    of_a_session(tmp_path)
    live = of_a_session(tmp_path, seed=1)
    again = loop_of(Votes.replay(tmp_path / "votes.jsonl"), seed=1)
    again.advance(2)
    assert torch.equal(weights(again), weights(live))
    assert len(again.rewards.record.asked(0)) == 8


@pytest.mark.parametrize("changed", [{"model": None}, {"every": 2}])
def test_nobody_is_asked_about_a_picture_with_nan(changed):
    votes, images = voted(**changed), torch.rand(3, 3, 4, 4)
    images[1, 2, 3, 0] = float("nan")
    prompts, group = [Prompt("one")] * 3, torch.zeros(3, dtype=torch.long)
    for step in (0, 1):
        with pytest.raises(ValueError, match="Votes needs images of finite numbers; image 1 of 3, prompt 'one', holds NaN or infinity"):
            votes.of_step(images, prompts, group, Progress(step, 4, None))
    assert not votes.record.count()
