"""Budgets of a temperature: which samples of a step they count."""

import attrs
import pytest
import torch
from chosen import PROMPTS
from tiny import pair

from diffalign import AlignmentLoop
from diffalign.core import Partial, Progress, ScoredBatch, StandardizedParts, Streams
from diffalign.objectives import ELBO, Budget, EffectiveSamples, ELBOGroupForwardKL, ELBOSoftmaxTB, GroupForwardKL, KLBudget, SoftmaxTB
from diffalign.objectives.temperature import Temperature
from diffalign.objectives.terms import effective_share
from diffalign.prompts import Mixture, Source
from diffalign.samplers import Branching, ChainSampler, roll_out
from diffalign.testing import TinyPolicy

OBJECTIVES = pytest.mark.parametrize(
    "make",
    [
        SoftmaxTB,
        GroupForwardKL,
        lambda *given, **options: ELBOSoftmaxTB(*given, bound=ELBO(), **options),
        lambda *given, **options: ELBOGroupForwardKL(*given, bound=ELBO(), **options),
    ],
    ids=["SoftmaxTB", "GroupForwardKL", "ELBOSoftmaxTB", "ELBOGroupForwardKL"],
)
NONE, ALL = torch.zeros(12, dtype=torch.bool), torch.ones(12, dtype=torch.bool)
DIFFERENT, EQUAL, HELD = range(3)


def step_of(policy, kinds=(DIFFERENT, EQUAL, HELD)):
    """A batch of three prompts: one whose rewards differ, one whose rewards are equal, one that no reward scores; or others."""
    with torch.no_grad():
        forest = roll_out(policy, policy.encode(PROMPTS), Branching((1, 1, 1), (0.7, 0.5, 0.0), roots=4), Streams(1, 2))
    kind = torch.tensor(kinds)[forest.group]
    scores = forest.samples.flatten(1)[:, 0].detach().float()
    values = torch.where(kind == DIFFERENT, scores, torch.where(kind == EQUAL, 0.7, 0.0))
    part = Partial(values, kind != HELD)
    return ScoredBatch(forest, values, {"r": part}, 3, Progress(2, 10), Streams(1, 2))


def measured(objective, batch):
    (phase,) = objective.phases()
    losses = list(phase.losses(batch, 0))
    names = dict.fromkeys(name for loss in losses for name in loss.metrics)
    pairs = {name: [sum(float(loss.metrics[name][place]) for loss in losses if name in loss.metrics) for place in (0, 1)] for name in names}
    return {name: total / max(count, 1e-300) for name, (total, count) in pairs.items()}


def beta_after(objective, metrics):
    """The temperature at the next step."""
    objective.observe(metrics, Progress(2, 10))
    return objective._temperature(Progress(3, 10))


@OBJECTIVES
@pytest.mark.parametrize("rows", [None, 2])
def test_effective_samples_count_groups_whose_rewards_differ(make, rows):
    policy, reference = pair()
    batch = step_of(policy)
    objective = make(policy, reference, beta=EffectiveSamples(0.5, start=40.0, rate=0.1), rows=rows)
    metrics = measured(objective, batch)
    share = effective_share(40.0 * batch.rewards.double(), batch.trajectories.group)
    assert metrics["budget/samples"] == pytest.approx(1 / 3)
    assert metrics["budget/used"] == pytest.approx(float(share[:4].mean()))
    assert metrics["ess/target"] == pytest.approx((float(share[:4].mean()) + 2) / 3)  # of all groups, as ever
    assert metrics["budget/used"] < 0.5 < metrics["ess/target"]
    assert beta_after(objective, metrics) < 40.0


@OBJECTIVES
@pytest.mark.parametrize("kinds", [(EQUAL, EQUAL, EQUAL), (HELD, HELD, HELD), (EQUAL, HELD, HELD)])
def test_effective_samples_leave_beta_in_a_step_without_a_target(make, kinds):
    policy, reference = pair()
    objective = make(policy, reference, beta=EffectiveSamples(0.5, start=40.0))
    metrics = measured(objective, step_of(policy, kinds))
    assert metrics["budget/samples"] == 0
    assert beta_after(objective, metrics) == 40.0


@OBJECTIVES
def test_nats_are_counted_where_a_reward_scores_the_prompt(make):
    """The policy is held on prompts without a reward; on equal rewards it spends nats as anywhere."""
    policy, reference = pair()
    objective, every = (make(policy, reference, beta=KLBudget(1.0, start=5.0)) for _ in range(2))
    mixed, scored = step_of(policy), step_of(policy, (DIFFERENT, EQUAL, EQUAL))
    metrics, whole = measured(objective, mixed), measured(every, scored)
    assert metrics["budget/samples"] == pytest.approx(2 / 3)
    assert whole["budget/used"] == whole["log_ratio/reference"] == pytest.approx(metrics["log_ratio/reference"])
    parts = [
        measured(make(policy, reference, beta=KLBudget(1.0)), step_of(policy, kinds))["budget/used"] for kinds in ((0, 2, 2), (2, 1, 2))
    ]
    assert metrics["budget/used"] == pytest.approx(sum(parts) / 2)
    assert metrics["budget/used"] != pytest.approx(metrics["log_ratio/reference"], rel=1e-3)
    room = 1 - metrics["budget/used"]
    assert KLBudget(1.0).room(metrics) == pytest.approx(room)


@OBJECTIVES
def test_nats_leave_beta_in_a_step_without_a_scored_prompt(make):
    policy, reference = pair()
    objective = make(policy, reference, beta=KLBudget(1.0, start=5.0))
    metrics = {**measured(objective, step_of(policy, (HELD, HELD, HELD))), "target/spread": 1.0}  # of 0 it would rest as well
    assert beta_after(objective, {**metrics, "budget/samples": 1.0}) != 5.0
    objective = make(policy, reference, beta=KLBudget(1.0, start=5.0))
    assert beta_after(objective, metrics) == 5.0


def test_of_a_prompt_some_of_whose_pictures_have_a_score_all_nats_count():
    """The log-ratios of chosen samples estimate no KL."""
    policy, reference = pair()
    batch = step_of(policy, (DIFFERENT, DIFFERENT, DIFFERENT))
    some = attrs.evolve(batch, parts={"r": Partial(batch.rewards, torch.arange(12) % 4 == 1)})
    metrics = measured(SoftmaxTB(policy, reference, beta=KLBudget(1.0)), some)
    assert metrics["budget/samples"] == 1
    assert metrics["budget/used"] == pytest.approx(metrics["log_ratio/reference"])


def test_a_reward_that_is_only_logged_makes_no_prompt_count():
    policy, reference = pair()
    batch = step_of(policy)
    logged = attrs.evolve(batch, parts={**batch.parts.parts, "other": batch.rewards}, weights={"r": 1.0})
    assert measured(SoftmaxTB(policy, reference, beta=KLBudget(1.0)), logged)["budget/samples"] == pytest.approx(2 / 3)


def test_beside_held_prompts_a_share_is_reached_and_beta_stays_where_it_is():
    mixture = Mixture({"seen": Source(["p", "q"], 1), "held": Source(["r", "s"], 1, [])})
    objective = SoftmaxTB(TinyPolicy(), beta=EffectiveSamples(share=0.5, start=20.0))
    loop = AlignmentLoop(
        objective,
        ChainSampler(4, samples=8),
        lambda images, prompts: images.mean((1, 2, 3)),
        mixture,
        prompts_per_step=2,
        aggregation=StandardizedParts(),
        optimizers=1e-6,
    )
    metrics = [loop.step(mixture.draw(step, 2), Progress(step, 120)).metrics for step in range(120)]
    assert {step["budget/samples"] for step in metrics} == {0.5}
    assert sum(step["budget/used"] for step in metrics[-40:]) / 40 == pytest.approx(0.5, abs=0.1)
    assert max(step["beta"] for step in metrics) <= 20.0


@pytest.mark.parametrize("beta", [2.0, None])
def test_what_is_no_budget_of_ours_adds_no_metric(beta):
    @attrs.frozen
    class Mine(Budget):
        start: float = 4.0
        rate: float = 0.5
        gain: float = 0.0

        def room(self, metrics):
            return metrics["reward"]

    policy, reference = pair()
    objective = SoftmaxTB(policy, reference, beta=Mine() if beta is None else beta)
    metrics = measured(objective, step_of(policy))
    assert not [name for name in metrics if name.startswith("budget/")]
    temperature = Temperature(Mine(), "Mine")
    temperature.observe({"reward": 1.0}, Progress(0, 10))
    assert temperature(Progress(1, 10)) > 4.0
