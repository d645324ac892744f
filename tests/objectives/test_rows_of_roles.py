"""The network rows of objectives with several roles, as forecast, are those of a step: with gradient and without, whole and in pieces."""

import pytest
import torch
from few_step_cases import moved, tiny_student

from diffalign import AlignmentLoop
from diffalign.core import CPS, Guided, Outline, Progress, UpdateRows
from diffalign.costs.capacity import Cluster, capacity
from diffalign.costs.forecast import forecast
from diffalign.costs.limits import work_of
from diffalign.objectives import DirectReinforcement, NormGuarded, OnPolicyDistillation, SurrogateReward, TrajectoryDistributionMatching
from diffalign.objectives.few_step import (
    CleanerStages,
    EveryStage,
    FinalStage,
    InOrder,
    MonteCarlo,
    MovingReference,
    NoTrustRegion,
    RewardWeighted,
    StudentScore,
    UniformStages,
    WeightedMix,
)
from diffalign.policies import TDMPolicy
from diffalign.prompts import Prompts
from diffalign.samplers import ChainSampler, DeterministicSampler, FixedPlan, TreeSampler
from diffalign.testing import TinyPolicy, channel_reward

ENDS = DeterministicSampler(4, samples=3)
CHAINS = ChainSampler(steps=4, samples=3, eta=0.5, window=(0, 3))
PROMPTS = 2


def noisy_student():
    return TDMPolicy(TinyPolicy((2, 2)), kernel=CPS())


def teachers(policy):
    return {name: moved(policy.fork(trainable=True), by).fork() for name, by in (("one", 0.1), ("two", 0.2))}


CASES = {
    "distillation": (TrajectoryDistributionMatching, tiny_student, ENDS),
    "guided, some stages": (
        lambda policy: TrajectoryDistributionMatching(policy, guidance=3.0, stages=UniformStages(2), fake_regularization=0.1),
        tiny_student,
        ENDS,
    ),
    "two updates of the fake": (
        lambda policy: TrajectoryDistributionMatching(policy, plan=InOrder({"fake": 2}), fake_regularization=0.1),
        tiny_student,
        ENDS,
    ),
    "replayed ends": (TrajectoryDistributionMatching, noisy_student, CHAINS),
    "reinforced": (lambda policy: SurrogateReward(policy, surrogate_stages=FinalStage(2)), tiny_student, ENDS),
    "guided twice": (
        lambda policy: SurrogateReward(policy, guidance=3.0, reward_guidance=2.0, stages=UniformStages(3), plan=InOrder()),
        tiny_student,
        ENDS,
    ),
    "a guided teacher": (
        lambda policy: SurrogateReward(policy, teacher=Guided(policy.fork(pristine=True), 3.0)),
        tiny_student,
        ENDS,
    ),
    "a moving reference": (lambda policy: SurrogateReward(policy, reference=MovingReference()), tiny_student, ENDS),
    "no trust region": (lambda policy: SurrogateReward(policy, trust_region=NoTrustRegion(), fake_regularization=0.0), tiny_student, ENDS),
    "a trained reference": (
        lambda policy: SurrogateReward(
            policy, reference=StudentScore(), baseline=StudentScore(), group_objective=RewardWeighted(), plan=InOrder({"fake": 2})
        ),
        tiny_student,
        ENDS,
    ),
    "the reward alone": (
        lambda policy: SurrogateReward(policy, mix=WeightedMix(reward=1.0, guidance=0.0, kl=0.0), guidance=3.0),
        tiny_student,
        ENDS,
    ),
    "no reward": (
        lambda policy: SurrogateReward(policy, mix=WeightedMix(reward=0.0), guidance=3.0, surrogate_stages=CleanerStages(3)),
        tiny_student,
        ENDS,
    ),
    "last stage spared": (lambda policy: SurrogateReward(policy, reward_stages=3, stages=EveryStage()), tiny_student, ENDS),
    "stochastic": (lambda policy: SurrogateReward(policy, attribution=MonteCarlo()), noisy_student, CHAINS),
    "direct": (lambda policy: DirectReinforcement(policy, levels=2), tiny_student, ENDS),
    "direct, not clipped": (
        lambda policy: DirectReinforcement(policy, levels=1, clip=None, plan=InOrder({"generator": 2})),
        tiny_student,
        ENDS,
    ),
    "several teachers": (lambda policy: OnPolicyDistillation(policy, {"one": teachers(policy)["one"]}), TinyPolicy, ENDS),
    "guarded": (lambda policy: NormGuarded(TrajectoryDistributionMatching(policy)), tiny_student, ENDS),
}


def loop_of(case):
    objective, policy, sampler = CASES[case]
    return AlignmentLoop(objective(policy()), sampler, channel_reward, Prompts(["a", "b", "c"]), prompts_per_step=PROMPTS)


def counted(loop, monkeypatch):
    """Rows of each call of the network in the update of one step: with gradient, without."""
    calls = {True: [], False: []}
    called = TinyPolicy.velocity
    inside = type(loop._update).__call__

    def velocity(self, latents, *told):
        calls[torch.is_grad_enabled()].append(len(latents))
        return called(self, latents, *told)

    def update(self, *told):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TinyPolicy, "velocity", velocity)
            return inside(self, *told)

    monkeypatch.setattr(type(loop._update), "__call__", update)
    loop.step(loop.prompts.draw(0, PROMPTS), Progress(0, 10))
    return calls


@pytest.mark.parametrize("budget", [None, 4])
@pytest.mark.parametrize("case", CASES)
def test_calls_of_an_update_are_those_of_a_step(case, budget, monkeypatch):
    loop = loop_of(case)
    loop.objective.rows = budget
    tree = loop.sampler.branching()
    rows = loop.objective.step_rows(loop.sampler.outline(loop.objective.behavior()))
    work = work_of(loop, tree, max(rows.trained))
    calls = counted(loop, monkeypatch)
    assert sum(calls[True]) == sum(work.update) == PROMPTS * sum(rows.trained)
    assert sum(calls[False]) == sum(work.beside)
    assert max(work.update) == max(calls[True])
    if budget is None:
        assert sorted(calls[True]) == sorted(work.update)
        assert sum(work.beside) == PROMPTS * sum(rows.frozen)


def line(text, name):
    return next(row for row in text.splitlines() if row.startswith(name))


def test_a_forecast_says_them():
    loop = loop_of("reinforced")  # 3 samples: 6 rows of clean ends, 12 of four stages for fake and student; teacher, old; then four more
    text = forecast(loop, 10)
    assert line(text, "update").split(maxsplit=1)[1] == (
        "30 network rows a prompt with gradient, in losses of the trained roles of at most 12, and 72 without; 60 and 144 a step"
    )
    assert "activations of 24 rows in the update" in text
    plan = capacity(loop, Cluster(teraflops=1.0))
    assert " for 24 rows in the update" in line(plan, "memory of a device")
    assert "TFLOP a step and device" in line(plan, "steps per hour")


def test_a_budget_bounds_the_memory_that_is_forecast():
    loop = loop_of("reinforced")
    loop.objective.rows = 5
    assert "activations of 5 rows in the update" in forecast(loop, 10)


def test_trees_share_states_whose_number_is_not_known():
    policy = TinyPolicy()
    objective = OnPolicyDistillation(policy, teachers(policy))
    loop = AlignmentLoop(objective, TreeSampler(4, FixedPlan((1, 2))), channel_reward, Prompts(["a"]), prompts_per_step=1)
    assert objective.step_rows(loop.sampler.outline(policy)) is None
    assert "not known" in line(forecast(loop, 10), "update")


def test_rows_add_up_and_repeat():
    one, other = UpdateRows((1, 2), (3,), (2,)), UpdateRows((4,))
    assert one + other * 2 == UpdateRows((1, 2, 4, 4), (3,), (2,))
    assert UpdateRows() * 3 == UpdateRows()


@pytest.mark.parametrize(("sampler", "mean"), [(EveryStage(), 1.0), (UniformStages(2), 0.5), (FinalStage(2), 0.0), (CleanerStages(2), 0.2)])
def test_the_mean_number_of_stages(sampler, mean):
    total = 4 if isinstance(sampler, EveryStage) else 2
    assert sampler.expected(4) == total
    assert sampler.expected(4, among=[0]) == pytest.approx(mean, abs=0.08)  # 2 draws, each of stage 0 with P = 1 / 10
    assert sampler.expected(4, among=[]) == 0


def test_an_outline_counts_its_stages():
    assert Outline(3, (0.0,) * 4, torch.linspace(1, 0, 5)).stages == 4
