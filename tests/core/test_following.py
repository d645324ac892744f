"""Weights that follow those of another policy."""

import pytest
import torch

from diffalign.core import Constant, Follower, Linear, Progress
from diffalign.testing import TinyPolicy


def pair(target=0.0, source=1.0):
    policy = TinyPolicy()
    fork = policy.fork()
    with torch.no_grad():
        fork.network.lora_B.weight.fill_(target)
        policy.network.lora_B.weight.fill_(source)
    return fork, policy


def followed(follower, step=0):
    target, source = pair()
    follower.move(target, source, Progress(step, 10))
    assert bool((source.network.lora_B.weight == 1).all())
    assert target.network.body is source.network.body
    (value,) = set(target.network.lora_B.weight.flatten().tolist())
    return value


@pytest.mark.parametrize(("decay", "value"), [(0, 1.0), (0.25, 0.75), (1.0, 0.0), (Constant(0.5), 0.5), (Linear(0.0, 1.0, 4), 0.75)])
def test_the_target_keeps_its_share(decay, value):
    assert followed(Follower(decay), step=1) == value


def test_it_moves_after_every_so_many_steps():
    assert [followed(Follower(0.0, every=3), step) for step in range(7)] == [0, 0, 1, 0, 0, 1, 0]


def test_what_cannot_be_is_refused_before_a_weight_moves():
    target, source = pair()
    for decay, said in ((-0.5, "-0.5"), (Constant(1.2), "1.2"), (float("nan"), "nan")):
        for every in (1, 5):
            with pytest.raises(ValueError, match=rf"Mine.decay must lie in \[0, 1\]; got {said} at step 2"):
                Follower(decay, every, "Mine.decay").move(target, source, Progress(2, 10))
    assert bool((target.network.lora_B.weight == 0).all())
    with pytest.raises(ValueError, match="every"):
        Follower(0.5, every=0)


def test_it_is_a_value():
    assert Follower(Linear(0.0, 1.0, 4), 2) == Follower(Linear(0.0, 1.0, 4), 2)
