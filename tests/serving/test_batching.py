"""Requests share batches, and nothing else."""

import threading
import time

import pytest
import torch
from running import ask, request, running

from diffalign.core import Prompt
from diffalign.rewards.wire import HEALTH


class Recorder:
    """Scores an image by its prompt's number; holds the first call until told to go on."""

    def __init__(self, holds=100):
        self.holds, self.batches = holds, []
        self.begun, self.go_on = threading.Event(), threading.Event()

    def __call__(self, images, prompts):
        if len(images) > self.holds:
            raise MemoryError
        self.batches.append((tuple(images.shape), [str(prompt) for prompt in prompts]))
        self.begun.set()
        self.go_on.wait(20)
        return torch.tensor([float(prompt.metadata["n"]) for prompt in prompts])


def together(reward, requests, **settings):
    """Answers to requests that wait while a first one is scored."""
    answers = {}
    with running(reward, **settings) as address:

        def send(name, body):
            answers[name] = ask(address, body)

        threads = [threading.Thread(target=send, args=("first", request(prompts=[Prompt("first", {"n": -1})])))]
        threads[0].start()
        reward.begun.wait(10)
        for place, body in enumerate(requests):
            threads.append(threading.Thread(target=send, args=(place, body)))
            threads[-1].start()
            while ask(address, None, "GET", HEALTH)[1]["waiting"] <= place:  # so that the order is known
                time.sleep(0.002)
        reward.go_on.set()
        for thread in threads:
            thread.join(20)
    assert answers.pop("first")[1]["scores"] == [-1]
    return [answers[place] for place in range(len(requests))]


def named(first, count=1, size=4):
    return request(count, size, f"id-{first}", [Prompt(f"p{first + place}", {"n": first + place}) for place in range(count)])


def test_what_waits_is_scored_together_and_told_apart():
    reward = Recorder()
    answers = together(reward, [named(0, 2), named(2), named(3, 3), named(6, 4)], batch=8)
    assert [message["scores"] for _, message in answers] == [[0, 1], [2], [3, 4, 5], [6, 7, 8, 9]]
    assert [message["id"] for _, message in answers] == ["id-0", "id-2", "id-3", "id-6"]
    assert [prompts for _, prompts in reward.batches[1:]] == [[f"p{n}" for n in range(6)], ["p6", "p7", "p8", "p9"]]


def test_images_of_other_sizes_are_not_mixed():
    reward = Recorder()
    together(reward, [named(0), named(1, size=6), named(2, size=6), named(3)], batch=8)
    assert [shape for shape, _ in reward.batches] == [(1, 3, 4, 4), (1, 3, 4, 4), (2, 3, 6, 6), (1, 3, 4, 4)]


def test_a_large_request_is_scored_in_pieces():
    reward = Recorder()
    (answer,) = together(reward, [named(0, 7)], batch=3)
    assert answer[1]["scores"] == list(range(7))
    assert [shape[0] for shape, _ in reward.batches[1:]] == [3, 3, 1]


def test_when_memory_runs_out_batches_are_halved():
    reward = Recorder(holds=3)
    answers = together(reward, [named(0, 3), named(3, 4)], batch=8)
    assert [message["scores"] for _, message in answers] == [[0, 1, 2], [3, 4, 5, 6]]
    assert max(shape[0] for shape, _ in reward.batches) == 3


def test_ones_mistake_is_told_to_nobody_else():
    reward = Recorder()
    broken = request(identity="broken", prompts=[Prompt("without")])
    answers = together(reward, [named(0), broken, named(2)], batch=8)
    assert [status for status, _ in answers] == [200, 422, 200]
    assert "raised KeyError for 1 images: 'n'" in answers[1][1]["error"]["message"]


@pytest.mark.parametrize("failure", [SystemError("from C"), RecursionError(), AssertionError("bug")])
def test_whatever_a_reward_raises_the_next_request_is_served(failure):
    def reward(images, prompts):
        if prompts[0] == "bad":
            raise failure
        return [1.0] * len(images)

    with running(reward) as address:
        assert ask(address, request(prompts=[Prompt("bad")]))[0] == 500
        assert ask(address, request())[0] == 200
