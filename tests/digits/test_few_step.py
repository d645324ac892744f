"""Few-step students of the embedded flow: distilled and reinforced, with a teacher that is loaded frozen."""

import torch

from diffalign import AlignmentLoop
from diffalign.core import Prompt
from diffalign.digits import ClassReward, DigitsPolicy
from diffalign.objectives import SurrogateReward, TrajectoryDistributionMatching
from diffalign.policies import TDMPolicy
from diffalign.prompts import Prompts
from diffalign.samplers import DeterministicSampler

PROMPTS = [Prompt("a digit"), Prompt("a thin seven")]


def moved_by(objective, base):
    """Whether each role moved in two steps of a run."""
    start = {role: [p.detach().clone() for p in policy.parameters()] for role, policy in objective.policies().items()}
    AlignmentLoop(objective, DeterministicSampler(4, samples=4), ClassReward(), Prompts(PROMPTS), prompts_per_step=2).run(2)
    return {
        role: any(not torch.equal(old, new) for old, new in zip(start[role], policy.parameters(), strict=True))
        for role, policy in objective.policies().items()
    }


def test_a_student_is_reinforced(base):
    student = TDMPolicy(base.fork(trainable=True), steps=4)
    objective = SurrogateReward(student, teacher=DigitsPolicy.from_pretrained(device="cpu", trainable=False))
    found = moved_by(objective, base)
    assert found.pop("generator")
    assert found.pop("surrogate")
    assert found.pop("fake")
    assert not found["teacher"]


def test_a_student_is_distilled(base):
    student = TDMPolicy(base.fork(trainable=True), steps=4)
    objective = TrajectoryDistributionMatching(student, teacher=DigitsPolicy.from_pretrained(device="cpu", trainable=False), guidance=2.0)
    assert moved_by(objective, base) == {"generator": True, "fake": True, "teacher": False}


def test_a_student_is_saved_and_found_again(base, tmp_path):
    student = TDMPolicy(base.fork(trainable=True), steps=4)
    with torch.no_grad():
        next(student.parameters()).add_(0.1)
    student.save(str(tmp_path))
    again = TDMPolicy.from_saved(base.fork(trainable=True), str(tmp_path))
    assert all(torch.equal(one, other) for one, other in zip(again.parameters(), student.parameters(), strict=True))
