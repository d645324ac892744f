"""What an aggregation may return: one finite floating-point number per sample. Everything else is refused by its name."""

import pytest
import torch
from loops import PROMPTS, Phased, build, phase, same, weights
from meeting import Meeting

from diffalign.core import Aggregation, NonFiniteError, Partial, Progress
from diffalign.objectives import SoftmaxTB
from diffalign.testing import TinyPolicy


def bright(images, prompts):
    return images.mean(dim=(1, 2, 3))


class Own(Aggregation):
    """An aggregation of a user's, made of one function."""

    def __init__(self, function):
        self.function = function

    def __call__(self, parts, group):
        return self.function(parts, group)


def step(function, rewards=bright, policy=None, **options):
    policy = TinyPolicy() if policy is None else policy
    return build(SoftmaxTB(policy), rewards=rewards, aggregation=Own(function), **options).step(PROMPTS.draw(0, 2), Progress(0, 1))


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda parts, group: parts["bright"][:, None], r"a tensor of shape \(12, 1\), torch.float32"),
        (lambda parts, group: parts["bright"][:3], r"a tensor of shape \(3,\), torch.float32"),
        (lambda parts, group: parts["bright"].mean()[None], r"a tensor of shape \(1,\), torch.float32"),
        (lambda parts, group: parts["bright"].mean(), r"a tensor of shape \(\), torch.float32"),
        (lambda parts, group: parts["bright"].tolist(), "list"),
        (lambda parts, group: None, "NoneType"),
        (lambda parts, group: parts["bright"] > 0.5, r"a tensor of shape \(12,\), torch.bool"),
        (lambda parts, group: (parts["bright"] > 0.5).long(), r"a tensor of shape \(12,\), torch.int64"),
    ],
    ids=["column", "too few", "one", "scalar", "list", "nothing", "bool", "whole numbers"],
)
def test_anything_but_one_number_per_sample_is_refused_before_a_weight_moves(function, found):
    policy = TinyPolicy()
    before = weights(policy)
    wanted = r"the aggregation Own must return one number per sample, a floating-point tensor of shape \(12,\), .* it returned "
    with pytest.raises(ValueError, match=f"{wanted}{found}$"):
        step(function, policy=policy)
    assert same(weights(policy), before)


def test_an_unknown_reward_is_refused_with_the_known_ones():
    wanted = r"the rewards are bright, dark; an aggregation or objective asked for 'darkk'$"
    for asked in (lambda parts, group: parts["darkk"], lambda parts, group: parts.partial("darkk").values):
        with pytest.raises(ValueError, match=wanted):
            step(asked, {"bright": bright, "dark": lambda images, prompts: -bright(images, prompts)})
    assert step(lambda parts, group: parts.get("darkk", parts["bright"])).metrics["reward"]  # a mapping as any other


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_the_aggregations_fault(value):
    policy = TinyPolicy()
    before = weights(policy)

    def spoilt(parts, group):
        return parts["bright"].index_fill(0, torch.tensor([7]), value)

    wanted = rf"^Own must give finite rewards, and at step 0 it gave {value} for sample 7 of 12, prompt 'two blue stars'"
    with pytest.raises(NonFiniteError, match=wanted) as raised:
        step(spoilt, policy=policy)
    assert not raised.value.evidence.tensors["rewards"].isfinite().all()
    assert same(weights(policy), before)


def test_all_processes_refuse_what_one_of_them_gave():
    def spoilt(devices):
        def give(parts, group):
            return parts["bright"] / (0.0 if devices.rank == 1 else 1.0)

        with pytest.raises(NonFiniteError, match="Own must give finite rewards") as raised:
            step(give, devices=devices)
        return str(raised.value)

    found = Meeting().run(spoilt)
    assert "it gave a number that is not finite in another process" in found[0]
    assert "for sample 0 of 6" in found[1]


def test_large_rewards_whose_squares_alone_overflow_are_finite():
    policy = TinyPolicy()
    large = Own(lambda parts, group: parts["bright"].double() * 1e200)
    loop = build(Phased(policy, phase(policy=policy)), rewards=bright, aggregation=large)
    report = loop.step(PROMPTS.draw(0, 2), Progress(0, 1))
    assert report.batch.deviation == float("inf")


def test_the_place_of_a_sample_without_a_score_is_not_looked_at():
    def half(images, prompts):
        return Partial(bright(images, prompts), torch.arange(len(images)) % 2 == 0)

    report = step(lambda parts, group: torch.where(parts.partial("half").applies, parts.partial("half").values, 0.0), {"half": half})
    assert report.batch.deviation > 0
