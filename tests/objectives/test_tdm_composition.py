"""What goes with what: every policy and sampler under every objective trains, or is refused with a reason. Makes a table of the docs.

DIFFALIGN_WRITE_TABLES=1 pytest tests/objectives/test_tdm_composition.py writes the table anew.
"""

import os
from pathlib import Path

import pytest
import torch
from few_step_cases import PROMPTS, LinearPolicy, MirroredStage, flat, moved

from diffalign import AlignmentLoop
from diffalign.core import CPS, Hook, ShiftedGrid
from diffalign.objectives import (
    AWM,
    CRD,
    DGPO,
    RAM,
    DiffusionNFT,
    DirectReinforcement,
    ELBOGroupForwardKL,
    ELBOPolicyGradient,
    ELBOSoftmaxTB,
    FlowGRPO,
    GroupForwardKL,
    NormGuarded,
    OnPolicyDistillation,
    SoftmaxTB,
    SurrogateReward,
    TrajectoryDistributionMatching,
)
from diffalign.objectives.few_step import ExactTarget, FixedTime, MonteCarlo, Squared, Unnormalized
from diffalign.policies import GaussianMixturePolicy, TDMPolicy
from diffalign.prompts import Prompts
from diffalign.samplers import ChainSampler, DeterministicSampler, DrawnSteps, FixedPlan, Midpoint, TreeSampler
from diffalign.testing import ConstantReward, TinyPolicy, channel_reward

DOCUMENT = Path(__file__).parents[2] / "docs/few_step.md"
BEGIN, END = "<!-- composition: written by its test -->\n", "<!-- end of composition -->"

POLICIES = {
    "a policy": lambda: TinyPolicy((2, 2)),
    "a student": lambda: TDMPolicy(TinyPolicy((2, 2))),
    "a student with CPS": lambda: TDMPolicy(TinyPolicy((2, 2)), kernel=CPS()),
    "a student of 4 or 2 steps": lambda: TDMPolicy(TinyPolicy((2, 2)), also=[2], grid=ShiftedGrid(3.0), tag=" in {steps} steps"),
}
SAMPLERS = {
    "deterministic, 4 steps": DeterministicSampler(4, samples=3),
    "deterministic, 6 steps": DeterministicSampler(6, samples=3),
    "deterministic, 4 midpoint steps": DeterministicSampler(4, samples=3, solver=Midpoint()),
    "drawn, 4 or 2 steps": DrawnSteps([4, 2], samples=3),
    "chain, 4 steps": ChainSampler(steps=4, samples=3, eta=0.5),
    "tree, 4 steps": TreeSampler(4, FixedPlan((1, 2), branches=2)),
}
OBJECTIVES = {
    "SoftmaxTB": SoftmaxTB,
    "GroupForwardKL": GroupForwardKL,
    "FlowGRPO": FlowGRPO,
    "DiffusionNFT": DiffusionNFT,
    "DGPO": lambda policy: DGPO(policy, levels=2),
    "AWM": lambda policy: AWM(policy, levels=2),
    "CRD": lambda policy: CRD(policy, levels=2),
    "RAM": lambda policy: RAM(policy, levels=2),
    "ELBOSoftmaxTB": ELBOSoftmaxTB,
    "ELBOGroupForwardKL": ELBOGroupForwardKL,
    "ELBOPolicyGradient": ELBOPolicyGradient,
    "TrajectoryDistributionMatching": TrajectoryDistributionMatching,
    "SurrogateReward": SurrogateReward,
    "SurrogateReward, MonteCarlo": lambda policy: SurrogateReward(policy, attribution=MonteCarlo()),
    "DirectReinforcement": lambda policy: DirectReinforcement(policy, levels=2),
    "OnPolicyDistillation": lambda policy: OnPolicyDistillation(policy, {"one": moved(policy.fork(trainable=True), 0.2).fork()}),
    "SoftmaxTB, NormGuarded": lambda policy: NormGuarded(SoftmaxTB(policy)),
    "DGPO, NormGuarded": lambda policy: NormGuarded(DGPO(policy, levels=2)),
}


class Norms(Hook):
    """Gradient norms by role, step by step."""

    def __init__(self):
        self.steps = []

    def step(self, loop, report):
        self.steps.append({name: value for name, value in report.metrics.items() if name.startswith("grad_norm/")})


def outcome(policy, sampler, objective):
    """ "trains", or why not: two steps of a run whose roles must all get finite gradients, and none of zero at the second."""
    norms = Norms()
    try:
        loop = AlignmentLoop(objective(moved(policy(), 0.1)), sampler, channel_reward, Prompts(PROMPTS), prompts_per_step=2, hooks=[norms])
    except ValueError as error:
        return str(error)
    roles = loop.trained()
    before = {role: flat(dict(trained.named_parameters())).clone() for role, trained in roles.items()}
    try:
        loop.run(2)
    except ValueError as error:
        for role, trained in roles.items():
            assert torch.equal(flat(dict(trained.named_parameters())), before[role]), f"refused after {role} had moved"
        return str(error)
    for role, trained in roles.items():
        values = [step[f"grad_norm/{role}"] for step in norms.steps]
        assert all(0 <= value < float("inf") for value in values), role
        assert values[1] > 0, role
        assert flat(dict(trained.named_parameters())).isfinite().all(), role
    return "trains"


REASONS = {
    "a sampler with 6 steps cannot use it": "another grid",
    "steps were asked for": "another grid",
    "Euler has no noise": "no noise to give",
    "the sampler draws deterministic trajectories alone": "needs noise",
    "needs deterministic trajectories": "needs a deterministic sampler",
    "needs every level of a trajectory": "needs every level",
    "needs the states of a trajectory": "needs every level",
    "solver must be None for a few-step student": "Euler steps alone",
    "must be at most the number of noise levels of the rollout": "needs more levels",
}


def short(text):
    if text == "trains":
        return text
    (reason,) = {name for part, name in REASONS.items() if part in text} or {text}
    return reason


@pytest.fixture(scope="module")
def table():
    rows = [["policy", "sampler", *OBJECTIVES]]
    for name, policy in POLICIES.items():
        for title, sampler in SAMPLERS.items():
            rows.append([name, title, *(short(outcome(policy, sampler, objective)) for objective in OBJECTIVES.values())])
    return rows


def test_every_pair_trains_or_is_refused_with_a_known_reason(table):
    cells = [cell for row in table[1:] for cell in row[2:]]
    assert set(cells) <= {"trains", *REASONS.values()}
    assert cells.count("trains") > len(cells) / 3
    for column in range(2, len(table[0])):
        assert "trains" in [row[column] for row in table[1:]], table[0][column]


def test_the_documents_table_is_this_one(table):
    lines = ["| " + " | ".join(row) + " |" for row in table]
    text = "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]]) + "\n"
    document = DOCUMENT.read_text()
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    if os.environ.get("DIFFALIGN_WRITE_TABLES"):
        DOCUMENT.write_text(before + BEGIN + text + END + after)
    assert BEGIN + text + END in DOCUMENT.read_text()


def test_a_teacher_aligned_with_softmax_tb_is_distilled():
    """A Gaussian that a reward has moved, taught to a student of one step that has never seen the reward."""
    aligned = GaussianMixturePolicy(torch.zeros(1, 2, dtype=torch.float64), 0.7)
    AlignmentLoop(
        SoftmaxTB(aligned, beta=60.0),
        TreeSampler(4, FixedPlan((1, 2), branches=3)),
        lambda images, prompts: images[:, 0, 0, 0],  # further to the right is better
        Prompts(PROMPTS),
        prompts_per_step=4,
        optimizers={"default": lambda parameters: torch.optim.Adam(parameters, lr=0.05)},
    ).run(40)
    teacher = aligned.fork()
    assert teacher.means[0, 0] > 0.5
    student = TDMPolicy(LinearPolicy((0.0, 0.0), 0.7), steps=1)
    objective = TrajectoryDistributionMatching(
        student, teacher, distance=Squared(), normalizer=Unnormalized(), fake_target=ExactTarget(), times=FixedTime(0.6)
    )
    rates = {"fake": 0.1, "generator": 0.2}
    optimizers = {role: lambda parameters, rate=rate: torch.optim.SGD(parameters, lr=rate) for role, rate in rates.items()}
    AlignmentLoop(
        objective, MirroredStage(512), ConstantReward(), Prompts(PROMPTS), prompts_per_step=1, optimizers=optimizers, max_grad_norm=None
    ).run(80)
    torch.testing.assert_close(student.policy.mean.detach(), teacher.means[0].detach(), rtol=0, atol=0.08)
