"""The moving average of the weights."""

import pytest
import torch

from diffalign.core import Average
from diffalign.testing import TinyPolicy


def weights(policy):
    return policy.network.lora_B.weight


def fill(policy, value):
    with torch.no_grad():
        weights(policy).fill_(value)


def test_the_average_starts_at_the_weights_and_is_a_fork():
    policy, average = TinyPolicy(), Average()
    average.start(policy)
    assert torch.equal(weights(average.policy), weights(policy))
    assert average.policy.network.body is policy.network.body
    assert not average.policy.trainable_parameters()
    fill(policy, 5.0)
    assert not torch.equal(weights(average.policy), weights(policy))


def test_the_average_of_a_constant_follows_the_closed_form():
    policy, average = TinyPolicy(), Average(decay=0.9)
    fill(policy, 0.0)
    average.start(policy)
    fill(policy, 1.0)
    missing = 1.0
    for step in range(100):
        average.update(policy, step)
        missing *= min((1 + step) / (10 + step), 0.9)
        torch.testing.assert_close(weights(average.policy), torch.full_like(weights(policy), 1 - missing), rtol=1e-5, atol=1e-6)
    assert (weights(policy) == 1).all()


def test_the_average_agrees_with_the_release(golden):
    policy, average = TinyPolicy(), Average(decay=0.9, every=8)
    fill(policy, 0.0)
    average.start(policy)
    fill(policy, 1.0)
    for step, expected in enumerate(golden["ema"]["trace_ema_of_constant_1_from_0_interval_8_decay_0.9"]):
        average.update(policy, step)
        torch.testing.assert_close(weights(average.policy), torch.full_like(weights(policy), expected), rtol=1e-6, atol=1e-7)


def test_without_decay_the_average_is_the_policy():
    policy, average = TinyPolicy(), Average(decay=0.0)
    average.start(policy)
    fill(policy, 3.0)
    average.update(policy, 0)
    assert torch.equal(weights(average.policy), weights(policy))


def test_an_average_that_has_not_started_does_nothing():
    average = Average()
    average.update(TinyPolicy(), 0)
    assert average.policy is None


@pytest.mark.parametrize(("name", "value"), [("decay", 1.0), ("decay", -0.1), ("every", 0)])
def test_numbers_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        Average(**{name: value})
