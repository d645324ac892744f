"""Pairs: as many as are wanted are asked about, if two pictures of a prompt differ."""

import pytest
import torch
from sessions import loop_of, voted

from diffalign.core import Progress
from diffalign.core.unessential import say_once
from diffalign.voting import AtRandom, Disagreement, Likes, Pairs

PROMPTS = [f"prompt {number}" for number in range(8)]


def asked(questions, each=4, **changed):
    """Votes on `each` pictures of each prompt at one step, and their questions."""
    votes = voted(questions=questions, **changed)
    images = torch.rand(each * len(PROMPTS), 3, 2, 2, generator=torch.Generator().manual_seed(0))
    prompts = [prompt for prompt in PROMPTS for _ in range(each)]
    found = votes.of_step(images, prompts, torch.arange(len(images)) // each, Progress(0, 1, None))
    return found, votes.record.asked(0)


@pytest.mark.parametrize("choice", [Disagreement(), AtRandom()])
@pytest.mark.parametrize("questions", [1, 2, 4, 15, 16])
def test_as_many_pairs_are_asked_about_as_are_wanted(questions, choice):
    _, those = asked(questions, ballot=Pairs(), choice=choice)
    assert len(those) == questions
    assert len({name for question in those for name in question.pictures}) == 2 * questions  # no picture is asked about twice


def test_what_is_left_of_each_prompt_bounds_the_pairs():
    assert len(asked(99, ballot=Pairs())[1]) == 16
    assert len(asked(99, each=3, ballot=Pairs())[1]) == 8


def test_every_step_of_a_run_over_many_prompts_asks():
    votes = voted(questions=2, ballot=Pairs())
    loop_of(votes, prompts=PROMPTS, prompts_per_step=8).advance(4)
    assert [len(votes.record.asked(step)) for step in range(4)] == [2] * 4


def test_likes_ask_about_the_pictures_that_are_chosen_first_alone():
    counts = []

    class Counting(AtRandom):
        def order(self, belief, count, progress):
            counts.append((len(belief.mean), count))
            return super().order(belief, count, progress)

    assert len(asked(5, ballot=Likes(), choice=Counting())[1]) == 5
    assert counts == [(32, 5)]


def test_a_step_without_two_pictures_of_a_prompt_is_said_once(capsys):
    say_once.cache_clear()
    for _ in range(2):
        found, those = asked(4, each=1, ballot=Pairs(), model=None)
        assert not those
        assert not found.applies.any()
    assert capsys.readouterr().err == "nobody is asked for votes at steps without 2 different pictures of a prompt, which pairs need\n"
