"""The rows of an update, as forecast, are those that a step evaluates; what nobody says is not known."""

import pytest
import torch

from diffalign import AlignmentLoop
from diffalign.core import Guided, Loss, Objective, Overlapped, Phase, Progress, Sequential
from diffalign.costs.capacity import Cluster, capacity
from diffalign.costs.forecast import forecast
from diffalign.objectives import AWM, DGPO, ELBO, DiffusionNFT, ELBOSoftmaxTB, FlowGRPO, GroupForwardKL, SoftmaxTB
from diffalign.prompts import Prompts
from diffalign.samplers import ChainSampler, DeterministicSampler, FixedPlan, TreeSampler
from diffalign.testing import TinyPolicy, channel_reward

DETERMINISTIC = DeterministicSampler(5, samples=3)
TREE = TreeSampler(5, FixedPlan((1, 2)))
CASES = {
    "SoftmaxTB": (SoftmaxTB, TREE, 1 + 3),
    "GroupForwardKL": (GroupForwardKL, TREE, 1 + 3),
    "FlowGRPO": (FlowGRPO, ChainSampler(5, samples=3), 3 * 3),
    "DiffusionNFT": (lambda policy: DiffusionNFT(policy, levels=2), DETERMINISTIC, 3 * 2),
    "DGPO": (lambda policy: DGPO(policy, levels=3, sigma_min=0.0), DETERMINISTIC, 3 * 3),
    "AWM": (lambda policy: AWM(policy, levels=2), DETERMINISTIC, 3 * 2),
    "ELBOSoftmaxTB": (lambda policy: ELBOSoftmaxTB(policy, bound=ELBO(levels=3)), DETERMINISTIC, 3 * 2 * 3 * 2),
    "DGPO on a tree": (lambda policy: DGPO(policy, levels=2, sigma_min=0.0), TREE, 9 * 2),
}


def build(objective, sampler, **options):
    return AlignmentLoop(objective, sampler, channel_reward, Prompts(["a", "b", "c"]), prompts_per_step=3, **options)


def line(text, name):
    return next(row for row in text.splitlines() if row.startswith(name))


@pytest.mark.parametrize("case", CASES)
def test_the_rows_of_an_update_are_those_of_a_step(case):
    objective, sampler, rows = CASES[case]
    loop = build(objective(TinyPolicy()), sampler)
    text = forecast(loop, 10)
    name = "update" if CASES[case][1] is DETERMINISTIC or "DGPO" in case else "replay"
    assert line(text, name).split(maxsplit=1)[1].startswith(f"{rows} network rows a prompt for ")
    assert f", {3 * rows} a step, per policy and update" in line(text, name)
    assert f"activations of {3 * rows} rows in the update" in text
    assert f" for {3 * rows} rows in the update" in line(capacity(loop, Cluster(teraflops=1.0)), "memory of a device")
    report = loop.step(loop.prompts.draw(0, 3), Progress(0, 10))
    assert report.ledger.rows["policy/update"] == 3 * rows


class Silent(Objective):
    """Says nothing about its rows."""

    def __init__(self, policy):
        self.policy = policy

    def phases(self):
        return (Phase({"policy": self.policy}, lambda batch, update: iter([Loss(torch.zeros(()))])),)


def test_what_an_objective_does_not_say_is_not_known():
    text = forecast(build(Silent(TinyPolicy()), DETERMINISTIC), 10)
    assert "not known: no step of the rollout is stochastic, and Silent does not say what it evaluates" in line(text, "update")
    assert line(text, "memory").endswith(", and activations of the update, which are not known:")
    planned = capacity(build(Silent(TinyPolicy()), DETERMINISTIC), Cluster(teraflops=1.0))
    assert line(planned, "memory of a device").endswith("the update comes on top, its rows are not known")


@pytest.mark.parametrize("rollout", [Sequential(), Sequential(2), Overlapped(1), Overlapped(2), Overlapped(9)])
@pytest.mark.parametrize("rows", [None, 4])
def test_the_calls_of_a_rollout_are_those_of_a_step(rollout, rows):
    loop = build(SoftmaxTB(TinyPolicy()), TreeSampler(5, FixedPlan((1, 2)), rows=rows), rollout=rollout)
    calls = int(line(forecast(loop, 10), "rollout").split(" in ")[1].split()[0])
    assert loop.step(loop.prompts.draw(0, 3), Progress(0, 10)).ledger.calls["policy/rollout"] == calls


class Led(SoftmaxTB):
    """Rolls out with guidance, and trains without."""

    def behavior(self):
        return Guided(self.policy, 3.0)


@pytest.mark.parametrize(
    ("objective", "times", "rows"),
    [
        (lambda: SoftmaxTB(Guided(TinyPolicy(), 3.0)), (2, 2), None),
        (lambda: SoftmaxTB(Guided(TinyPolicy(), 3.0), rows=2), (2, 2), 4),
        (lambda: SoftmaxTB(Guided(TinyPolicy(), 1.0)), (1, 1), None),
        (lambda: Led(TinyPolicy()), (2, 1), None),
    ],
    ids=["guided", "in pieces", "not guided", "guided in the rollout alone"],
)
def test_rows_and_calls_under_guidance_are_those_of_a_step(objective, times, rows):
    loop = build(objective(), TreeSampler(5, FixedPlan((1, 2)), rows=rows), check_rows=0)
    text, tree = forecast(loop, 10), loop.sampler.branching()
    ledger = loop.step(loop.prompts.draw(0, 3), Progress(0, 10)).ledger
    assert ledger.rows["policy/rollout"] == times[0] * 3 * tree.rollout_rows
    rows, calls = ledger.rows["policy/rollout"], ledger.calls["policy/rollout"]
    assert f" {times[0] * tree.rollout_rows} network rows a prompt, {rows} a step in {calls} calls" in line(text, "rollout")
    assert f" {times[1] * tree.replay_rows} network rows a prompt for " in line(text, "replay")
    assert f", {ledger.tracked['policy/update']} a step, per policy and update" in line(text, "replay")
    assert ledger.tracked["policy/update"] == times[1] * 3 * tree.replay_rows
