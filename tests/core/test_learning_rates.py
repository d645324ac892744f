"""Learning rates as functions of progress."""

import pytest
import torch

from diffalign import AlignmentLoop, Prompt
from diffalign.core import Constant, Cosine, Delayed, Linear, Loss, Objective, Phase, Progress, Scalar
from diffalign.core.learning_rates import require_factors
from diffalign.prompts import Prompts
from diffalign.samplers import DeterministicSampler
from diffalign.testing import TinyPolicy, channel_reward


class Shrinking(Objective):
    """Half the square of the weights of two roles: a step of SGD multiplies them by 1 - lr."""

    def __init__(self):
        self.policy, self.other = TinyPolicy(dtype=torch.float64), TinyPolicy(seed=1, dtype=torch.float64)

    def phases(self):
        def losses(batch, update):
            for policy in (self.policy, self.other):
                yield Loss(sum(parameter.square().sum() for parameter in policy.trainable_parameters().values()) / 2)

        return (Phase({"one": self.policy, "other": self.other}, losses),)


def build(factor):
    optimizers = {
        "one": lambda parameters: torch.optim.SGD(parameters, lr=0.5),
        "other": lambda parameters: torch.optim.SGD([{"params": parameters[:1], "lr": 0.1}, {"params": parameters[1:]}], lr=0.2),
    }
    loop = AlignmentLoop(
        Shrinking(), DeterministicSampler(2, 2), channel_reward, Prompts(["a"]), prompts_per_step=1,
        optimizers=optimizers, lr_factor=factor, max_grad_norm=None,
    )  # fmt: skip
    return loop, {
        role: [parameter.detach().clone() for parameter in policy.trainable_parameters().values()]
        for role, policy in loop.trained().items()
    }


def step(loop, number, total=4):
    return loop.step([Prompt("a")], Progress(number, total))


def test_every_group_of_every_role_is_multiplied_at_each_step():
    loop, start = build(Linear(1.0, 0.0, 4))
    seen = [step(loop, number).metrics["lr_factor"] for number in range(4)]
    assert seen == [1.0, 0.75, 0.5, 0.25]

    def left(rate):
        return (1 - rate) * (1 - 0.75 * rate) * (1 - 0.5 * rate) * (1 - 0.25 * rate)

    for role, rates in {"one": [0.5, 0.5], "other": [0.1, 0.2]}.items():
        after = list(loop.trained()[role].trainable_parameters().values())
        assert len(after) == len(rates)
        for before, now, rate in zip(start[role], after, rates, strict=True):
            torch.testing.assert_close(now.detach(), left(rate) * before)


def test_no_factor_leaves_the_optimizers_alone():
    loop, _ = build(1.0)
    assert "lr_factor" not in step(loop, 0).metrics
    assert all("initial_lr" not in group for optimizer in loop.running.values() for group in optimizer.param_groups)


def test_a_run_that_goes_on_without_a_factor_has_its_own_rates_again():
    loop, _ = build(Linear(1.0, 0.0, 4))
    step(loop, 2)
    halved = {role: optimizer.state_dict() for role, optimizer in loop.running.items()}
    resumed, _ = build(1.0)
    for role, optimizer in resumed.running.items():
        optimizer.load_state_dict(halved[role])
    assert resumed.running["one"].param_groups[0]["lr"] == 0.25
    step(resumed, 3)
    assert [group["lr"] for optimizer in resumed.running.values() for group in optimizer.param_groups] == [0.5, 0.1, 0.2]


@pytest.mark.parametrize("factor", [0.25, Constant(0.25)])
def test_a_number_is_a_constant_factor(factor):
    loop, start = build(factor)
    step(loop, 0)
    step(loop, 1)
    (now, *_), (before, *_) = loop.trained()["one"].trainable_parameters().values(), start["one"]
    torch.testing.assert_close(now.detach(), (1 - 0.125) ** 2 * before)


def test_a_cosine_runs_over_the_whole_run():
    loop, _ = build(Cosine(1.0, 0.5))
    assert [step(loop, number).metrics["lr_factor"] for number in (0, 3)] == pytest.approx([1.0, 0.5])


@pytest.mark.parametrize("factor", [Linear(1.0, -1.0, 2), float("nan"), float("inf")])
def test_a_factor_that_is_no_factor_is_refused_and_nothing_moves(factor):
    loop, start = build(factor)
    with pytest.raises(ValueError, match=r"lr_factor must be finite and at least 0; at step 3 it is (-1|nan|inf)"):
        step(loop, 3)
    for role, policy in loop.trained().items():
        for before, now in zip(start[role], policy.trainable_parameters().values(), strict=True):
            assert torch.equal(before, now)


def test_only_schedules_of_the_step_alone_are_looked_at_before_a_run():
    class Counting(Scalar):
        calls = 0

        def __call__(self, progress):
            self.calls += 1
            return 1.0 if progress.step == 0 else 1 / (1 + abs(progress.reward))

    counting = Counting()
    require_factors(counting, 100)
    assert counting.calls == 0
    with pytest.raises(ValueError, match=r"lr_factor must be finite and at least 0; at step 999999 it is -1"):
        require_factors(Delayed(1.0, -1.0, steps=999_999), 1_000_000)
    with pytest.raises(ValueError, match="at step 0 it is -2"):
        require_factors(-2.0, 10)
    require_factors(Cosine(1.0, 0.0), 7)
