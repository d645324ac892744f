"""Temperatures that are found while training, and what a run says of one that is too high."""

import math

import attrs
import pytest
import torch
from ring import MODES

from diffalign import AlignmentLoop, Prompt
from diffalign.core import CPS, Constant, Progress
from diffalign.objectives import EffectiveSamples, ELBOSoftmaxTB, GroupForwardKL, KLBudget, SoftmaxTB
from diffalign.objectives.temperature import LIMITS, Temperature
from diffalign.policies import GaussianMixturePolicy
from diffalign.prompts import Prompts
from diffalign.samplers import ChainSampler, FixedPlan, TreeSampler
from diffalign.testing import ConstantReward, TinyPolicy, channel_reward

OBJECTIVES = pytest.mark.parametrize("objective", [SoftmaxTB, GroupForwardKL])
TREE = TreeSampler(6, FixedPlan((1, 2, 3), branches=3, eta=0.9))


def loop_of(objective, reward=channel_reward, rate=0.05, prompts=2, sampler=TREE):
    return AlignmentLoop(
        objective,
        sampler,
        reward,
        Prompts([Prompt("a red cube")]),
        prompts_per_step=prompts,
        optimizers={"default": lambda parameters: torch.optim.Adam(parameters, lr=rate)},
    )


def run(loop, total, start=0, stop=None):
    """The metrics of each step."""
    return [
        dict(loop.step(loop.prompts.draw(step, loop.prompts_per_step), Progress(step, total, loop.reward)).metrics)
        for step in range(start, total if stop is None else stop)
    ]


def two_of_eight(images, prompts):
    places = (images[:, :2, 0, 0] - 0.5) * 16
    return (torch.cdist(places, torch.tensor(MODES[:2])).amin(dim=1) < 1.5).float()


def on_a_ring(beta, total):
    policy = GaussianMixturePolicy(MODES, scale=0.3, kernel=CPS("mean"))
    return run(loop_of(SoftmaxTB(policy, beta=beta), two_of_eight, 0.02, 8, TreeSampler(8, FixedPlan((0, 1, 2), 3, 0.9))), total)


def test_a_budget_in_nats_is_kept():
    """Two of eight modes are rewarded: all of the reward is more than a nat away."""
    metrics = on_a_ring(KLBudget(0.4, start=5.0), 160)
    last = [step["log_ratio/reference"] for step in metrics[-40:]]
    assert sum(last) / len(last) == pytest.approx(0.4, rel=0.2)


def test_a_budget_of_effective_samples_is_kept():
    metrics = on_a_ring(EffectiveSamples(0.6, start=50.0, rate=0.2), 80)
    last = [step["ess/target"] for step in metrics[-40:]]
    assert metrics[0]["ess/target"] < 0.5
    assert sum(last) / len(last) == pytest.approx(0.6, abs=0.06)


def test_the_first_change_is_that_of_the_formula():
    for budget, seen, factor in (
        (KLBudget(4.0, rate=0.2, gain=3.0), {"log_ratio/reference": 3.0}, math.exp(3.2 * 0.25)),
        (KLBudget(4.0, rate=0.2, gain=3.0), {"log_ratio/reference": 99.0}, math.exp(-3.2)),
        (KLBudget(4.0, rate=0.2, gain=3.0), {"log_ratio/reference": -99.0}, math.exp(3.2)),
        (EffectiveSamples(0.5, rate=0.1), {"ess/target": 0.25}, math.exp(-0.05)),
        (EffectiveSamples(0.5, rate=0.1), {"ess/target": 1.0}, math.exp(0.1)),
    ):
        temperature = Temperature(budget, "Mine")
        assert temperature(Progress(0, 10)) == 20.0
        temperature.observe(seen, Progress(0, 10))
        assert temperature(Progress(1, 10)) == pytest.approx(20.0 * factor)
        for step in range(500):
            temperature.observe(seen, Progress(step, 10))
        answer = factor / math.exp(math.log(factor) * budget.rate / (budget.rate + budget.gain))
        assert temperature(Progress(1, 10)) == pytest.approx(LIMITS[factor > 1] * answer)


@OBJECTIVES
def test_what_a_budget_has_found_goes_into_checkpoints(objective):
    policy = TinyPolicy((2, 2))
    first = objective(policy, beta=KLBudget(0.01))
    seen = run(loop_of(first), 4)
    assert seen[0]["beta"] == 20.0 != seen[3]["beta"]
    second = objective(policy, first.reference, beta=KLBudget(0.01))
    second.restore(first.state())
    assert second.state() == first.state() != {}
    expected = first.state()["beta"] * math.exp(2.0 * first.state()["answer"])
    assert run(loop_of(second), 5, 4)[0]["beta"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KLBudget(0.0), "KLBudget.nats must be positive and finite: it is how far the policy may go; got 0"),
        (lambda: KLBudget(math.inf), "KLBudget.nats must be positive and finite: it is how far the policy may go; got inf"),
        (lambda: KLBudget(math.nan), "KLBudget.nats must be positive and finite"),
        (lambda: KLBudget(1.0, start=-1.0), "KLBudget.start must be positive and finite: it is a temperature; got -1"),
        (lambda: KLBudget(1.0, rate=0.0), "KLBudget.rate must be positive and finite"),
        (lambda: KLBudget(1.0, gain=math.inf), "KLBudget.gain must be positive and finite"),
        (lambda: EffectiveSamples(0.0), "EffectiveSamples.share must lie between 0 and 1, both excluded: it is a share of samples; got 0"),
        (lambda: EffectiveSamples(1.0), "EffectiveSamples.share must lie between 0 and 1"),
        (lambda: EffectiveSamples(math.nan), "EffectiveSamples.share must lie between 0 and 1"),
        (lambda: EffectiveSamples(0.5, start=math.inf), "EffectiveSamples.start must be positive and finite"),
        (lambda: GroupForwardKL(TinyPolicy(), beta=-2.0), "GroupForwardKL.beta must be positive and finite: it is an inverse temperature"),
        (lambda: GroupForwardKL(TinyPolicy(), beta=KLBudget(1.0), measure="path"), "GroupForwardKL.beta must be a number or a schedule"),
    ],
)
def test_a_budget_that_is_none_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("objective", [SoftmaxTB, GroupForwardKL, ELBOSoftmaxTB])
def test_a_share_that_one_sample_exceeds_is_refused_before_the_run(objective):
    with pytest.raises(ValueError, match=rf"{objective.__name__}\.beta: EffectiveSamples.share must lie above 1 / 4 .*; got 0.25"):
        loop_of(objective(TinyPolicy((2, 2)), beta=EffectiveSamples(0.25)), sampler=ChainSampler(4, 4))
    loop_of(objective(TinyPolicy((2, 2)), beta=EffectiveSamples(0.26)), sampler=ChainSampler(4, 4))


@pytest.mark.parametrize(("measured", "end", "less"), [(1.0, 1e4, "more"), (0.26, 1e-2, "less")])
def test_a_budget_at_the_end_of_its_range_is_said_once(measured, end, less):
    temperature = Temperature(EffectiveSamples(0.9 if less == "less" else 0.5), "Mine")
    said = [temperature.observe({"ess/target": measured}, Progress(step, 400)) for step in range(400)]
    (text,) = [line for line in said if line is not None]
    assert text.startswith("Mine: EffectiveSamples(share=")
    assert f"has brought beta to {end:g} nats per unit of reward, the end of its range, and would take {less}." in text
    assert temperature(Progress(0, 1)) == end


def test_a_schedule_is_judged_when_it_gives_its_number():
    with pytest.raises(ValueError, match=r"Mine\.beta must be positive: it is an inverse temperature; got -1"):
        Temperature(Constant(-1.0), "Mine")(Progress(0, 1))


@OBJECTIVES
def test_a_reference_that_is_not_felt_is_said_once_after_a_tenth_of_the_run(objective, capsys):
    policy = TinyPolicy((2, 2))
    metrics = run(loop_of(objective(policy, beta=1e7), rate=1e-4), 40)
    assert max(step["reference/felt"] for step in metrics[:5]) < 0.01
    said = capsys.readouterr().err
    assert said.count("the reference has no influence") == 1
    assert said.startswith(f"step 4: {objective.__name__}: the reference has no influence. Within a group the log-ratio to it differs by ")
    assert "now 1e+07 nats per unit of reward; 5 to 40 is usual" in said


@OBJECTIVES
def test_a_reference_that_is_felt_needs_no_word(objective, capsys):
    metrics = run(loop_of(objective(TinyPolicy((2, 2)), beta=1.0)), 20)
    assert max(step["reference/felt"] for step in metrics[:3]) > 0.01
    assert capsys.readouterr().err == ""


@OBJECTIVES
def test_a_constant_reward_moves_nothing_and_is_no_sign_of_a_high_temperature(objective, capsys):
    """That rewards are equal is said by the run, of every objective: tests/test_never_blind.py."""
    policy = TinyPolicy((2, 2))
    before = [parameter.detach().clone() for parameter in policy.trainable_parameters().values()]
    metrics = run(loop_of(objective(policy), ConstantReward(0.5)), 30)
    assert capsys.readouterr().err == ""
    assert all(step["reference/felt"] == 0 for step in metrics)
    moved = zip(policy.trainable_parameters().values(), before, strict=True)
    assert max(float((now - then).detach().abs().max()) for now, then in moved) < 1e-6


@attrs.define
class Changing:
    """Rewards that are multiplied by `factor` from step `until` on, and again as they were from step `again` on."""

    until: int
    factor: float
    again: int = 10**9
    step: int = 0

    def __call__(self, images, prompts):
        self.step += 1
        return channel_reward(images, prompts) * (self.factor if self.until < self.step <= self.again else 1.0)


@pytest.mark.parametrize("budget", [KLBudget(10.0), EffectiveSamples(0.5)])
def test_beta_rests_while_no_group_has_different_rewards(budget):
    """The target is then the reference at every beta, so nats that are left do not say that beta is too small."""
    metrics = run(loop_of(SoftmaxTB(TinyPolicy((2, 2)), beta=budget), Changing(3, 0.0, again=40)), 42)
    betas = [step["beta"] for step in metrics]
    assert betas[0] == 20.0
    assert len(set(betas[:4])) == 4, "it follows the steps whose rewards differ"
    assert betas[3:41] == [betas[3]] * 38, "and stays in steps 3 to 39, whose rewards are equal"
    assert betas[41] != betas[40]


def test_a_group_of_equal_rewards_counts_beside_one_whose_rewards_differ():
    """The nats are spent in both, so the budget is that of the whole step."""
    objective = SoftmaxTB(TinyPolicy((2, 2)), beta=KLBudget(0.01))
    half = AlignmentLoop(
        objective,
        TREE,
        lambda images, prompts: channel_reward(images, prompts) * torch.tensor([float(prompt == "one") for prompt in prompts]),
        Prompts([Prompt("one"), Prompt("two")]),
        prompts_per_step=2,
        optimizers={"default": lambda parameters: torch.optim.Adam(parameters, lr=0.05)},
    )
    for step in run(half, 4):
        assert step["budget/samples"] == 1.0
        assert step["budget/used"] == step["log_ratio/reference"]


@OBJECTIVES
def test_what_a_run_says_does_not_depend_on_a_resume(objective, capsys):
    """The reference is felt until the tenth step, and no more when rewards are then much larger."""
    policy, larger = TinyPolicy((2, 2)), Changing(0, 1e9)
    first = objective(policy, beta=1.0)
    run(loop_of(first), 100, stop=10)
    again = objective(policy, first.reference, beta=1.0)
    again.restore(first.state())
    run(loop_of(again, larger), 100, start=10, stop=12)
    assert capsys.readouterr().err == ""
    fresh = objective(policy, first.reference, beta=1.0)
    fresh.restore({})  # an older checkpoint knows nothing of the steps before
    run(loop_of(fresh, larger), 100, start=10, stop=12)
    assert capsys.readouterr().err.count("the reference has no influence") == 1


def test_the_end_of_a_range_is_said_once_in_a_run_that_is_resumed():
    first, again, older = (Temperature(EffectiveSamples(0.5), "Mine") for _ in range(3))
    said = [first.observe({"ess/target": 1.0}, Progress(step, 400)) for step in range(100)]
    assert sum(line is not None for line in said) == 1
    again.restore(first.state())
    assert again.observe({"ess/target": 1.0}, Progress(100, 400)) is None
    assert again.state() == first.state()
    older.restore({name: first.state()[name] for name in ("beta", "answer")})
    assert older(Progress(100, 400)) == first(Progress(100, 400))
    assert "the end of its range" in older.observe({"ess/target": 1.0}, Progress(100, 400))


def test_a_run_that_is_resumed_late_has_nothing_to_say(capsys):
    loop = loop_of(SoftmaxTB(TinyPolicy((2, 2)), beta=1e7), rate=1e-4)
    run(loop, 20, start=10)
    assert capsys.readouterr().err == ""
