"""The loop: hooks and signals, that a run can be repeated bit for bit, averages, several processes."""

import math
import os
import signal

import attrs
import pytest
import torch
from loops import PROMPTS, Phased, Recorder, build, same, square, weights

from diffalign.core import Average, Hook, Interrupted, Loss, Phase, Progress, RewardError
from diffalign.objectives import SoftmaxTB
from diffalign.testing import TinyPolicy, channel_reward


def test_hooks_are_called_in_order_around_every_step():
    events = []
    loop = build(SoftmaxTB(TinyPolicy()), hooks=[Recorder(events, "a"), Recorder(events, "b"), Hook()])
    loop.run(3, start=1)
    expected = [("start", 1, 3), ("step", 1, 3), ("step", 2, 3), ("stop", 3, "NoneType")]
    assert events == [(name, *event) for event in expected for name in ("a", "b")]


def test_hooks_of_rewards_start_first_because_others_ask_rewards_and_come_last_because_they_may_end_the_run():
    class Attended:
        def __call__(self, images, prompts):
            return channel_reward(images, prompts)

        def hook(self):
            return Recorder(events, "reward", end)

    def end(report):
        if report.step == 1:
            raise Interrupted("enough")

    events = []
    loop = build(SoftmaxTB(TinyPolicy()), rewards=Attended(), hooks=[Recorder(events, "run")])
    with pytest.raises(Interrupted):
        loop.advance(3, also=[Recorder(events, "also")])
    assert events[:3] == [(name, "start", 0, 3) for name in ("reward", "run", "also")]
    then = [("step", 0, 3), ("step", 1, 3), ("stop", 2, "Interrupted")]
    assert events[3:] == [(name, *event) for event in then for name in ("run", "also", "reward")]


def test_a_run_of_no_steps_starts_and_stops():
    events = []
    build(SoftmaxTB(TinyPolicy()), hooks=[Recorder(events)]).run(2, start=2)
    assert events == [("hook", "start", 2, 2), ("hook", "stop", 2, "NoneType")]


def test_hooks_hear_of_an_error_with_the_steps_that_are_done():
    events = []

    def reward(images, prompts):
        return [float("nan") if ("hook", "step", 1, 5) in events else 1.0] * len(images)

    with pytest.raises(RewardError):
        build(SoftmaxTB(TinyPolicy()), rewards=reward, hooks=[Recorder(events)]).run(5)
    assert events[-2:] == [("hook", "step", 1, 5), ("hook", "stop", 2, "NonFiniteRewardError")]


def test_an_error_in_a_hook_stops_the_run_after_its_step():
    events = []

    def fail(report):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        build(SoftmaxTB(TinyPolicy()), hooks=[Recorder(events, on_step=fail)]).run(5)
    assert events == [("hook", "start", 0, 5), ("hook", "step", 0, 5), ("hook", "stop", 1, "OSError")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_run_between_steps(number):
    events = []
    policy = TinyPolicy()

    def reward(images, prompts):
        if ("hook", "step", 0, 9) in events:
            os.kill(os.getpid(), number)  # in the middle of the second step
        return channel_reward(images, prompts)

    loop = build(SoftmaxTB(policy), rewards={"channel_reward": reward}, hooks=[Recorder(events)])
    with pytest.raises(KeyboardInterrupt, match=number.name):
        loop.run(9)
    assert events[1:] == [("hook", "step", 0, 9), ("hook", "step", 1, 9), ("hook", "stop", 2, "Interrupted")]
    whole = build(SoftmaxTB(other := TinyPolicy()))
    whole.run(2)
    assert same(weights(policy), weights(other))


def trained(steps=3, seed=0, **options):
    policy = TinyPolicy()
    loop = build(SoftmaxTB(policy, rows=5, updates=2), optimizers={}, seed=seed, **options)
    loop.run(steps)
    return policy


def test_two_runs_are_equal_bit_for_bit():
    torch.manual_seed(1)
    one = trained()
    torch.manual_seed(2)
    assert same(weights(trained()), weights(one))
    assert not same(weights(trained(seed=1)), weights(one))


def test_a_run_in_two_parts_is_the_run_in_one():
    policy = TinyPolicy()
    loop = build(SoftmaxTB(policy, rows=5, updates=2), optimizers={})
    loop.run(2)
    loop.run(4, start=2)
    assert same(weights(policy), weights(trained(4)))


def test_the_average_follows_the_policy_and_is_what_one_evaluates():
    policy, average = TinyPolicy(), Average(decay=0.5)
    loop = build(SoftmaxTB(policy), average=average)
    start = weights(average.policy)
    assert same(start, weights(policy))
    loop.run(1)
    assert loop.evaluation_policy() is average.policy
    for name, value in weights(policy).items():  # decay of the first step: min(1 / 10, 0.5)
        torch.testing.assert_close(weights(average.policy)[name], 0.1 * start[name] + 0.9 * value)
    assert build(SoftmaxTB(policy)).evaluation_policy() is policy


@attrs.define
class Rank:
    """One of several processes, whose gradients are kept instead of exchanged."""

    rank: int
    size: int
    gradients: list = attrs.field(factory=list)

    def sum(self, values):
        return values

    def maximum(self, values):
        return values

    def gather(self, values):
        return values

    def sum_gradients(self, parameters):
        self.gradients.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))

    def barrier(self):
        pass


@pytest.mark.parametrize("size", [2, 3])
def test_gradients_of_the_ranks_add_up_to_that_of_one_process(size):
    def gradient(rank, size):
        policy = TinyPolicy(dtype=torch.float64)
        devices = Rank(rank, size)
        loop = build(SoftmaxTB(policy, policy.fork(pristine=True)), devices=devices, prompts_per_step=4)
        report = loop.step(PROMPTS.draw(0, 4), Progress(0, 1))
        return devices.gradients[0], report.batch

    whole, batch = gradient(0, 1)
    parts = [gradient(rank, size) for rank in range(size)]
    torch.testing.assert_close(sum(part for part, _ in parts), whole, rtol=0, atol=1e-10 * float(whole.norm()))
    assert all(share.groups == 4 for _, share in parts)
    for rank, (_, share) in enumerate(parts):
        ids = share.trajectories.condition.ids.tolist()
        assert ids == list(range(4))[rank::size]
        for place, prompt in enumerate(ids):
            mine, theirs = share.rewards[share.trajectories.group == place], batch.rewards[batch.trajectories.group == prompt]
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def test_metrics_are_summed_over_processes_before_they_are_divided():
    class Doubled(Rank):
        def sum(self, values):
            return values + torch.tensor([[1.0, 3.0]])  # another process that adds 1 over 3 samples to everything

    policy = TinyPolicy()

    def losses(batch, update):
        yield Loss(square(policy), {"mine": (torch.tensor(5.0), torch.tensor(2))})

    report = build(Phased(policy, Phase({"policy": policy}, losses)), devices=Doubled(0, 1)).step(PROMPTS.draw(0, 2), Progress(0, 1))
    assert report.metrics["mine"] == pytest.approx(6 / 5)
    assert report.metrics["reward"] == pytest.approx((float(report.batch.rewards.sum()) + 1) / (12 + 3))
    assert math.isfinite(report.metrics["memory/peak_bytes"])
