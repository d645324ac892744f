"""TDM-R1 against the student's own score: the surrogate's gain is what the advantage changes, and nothing else."""

import pytest
import torch
from few_step_cases import LinearPolicy, MirroredStage

from diffalign import AlignmentLoop
from diffalign.core import Hook
from diffalign.objectives import SurrogateReward
from diffalign.objectives.few_step import (
    FinalStage,
    FrozenTeacher,
    GroupAdvantage,
    MovingReference,
    NoTrustRegion,
    RewardWeighted,
    StudentScore,
)
from diffalign.policies import GaussianMixturePolicy, TDMPolicy
from diffalign.prompts import Prompts

MEAN, SCALE, STRENGTH = 1.0, 0.7, 0.2


def place(images, prompts):
    """Where the point lies."""
    return 16 * (images[:, 0, 0, 0] - 0.5)


class Means(Hook):
    """Of surrogate and reference, after every step."""

    def __init__(self):
        self.surrogate, self.reference = [], []

    def step(self, loop, report):
        for role, trail in ((loop.objective.surrogate, self.surrogate), (loop.objective._beside.reference, self.reference)):
            trail.append(role.means.detach().clone())


def learned(**options):
    """Both means, averaged over the last steps, beside a student N(1, 0.7^2) that rests and a teacher N(0, 0.7^2)."""
    teacher = GaussianMixturePolicy(torch.zeros(1, 1, dtype=torch.float64), SCALE)
    objective = SurrogateReward(
        TDMPolicy(LinearPolicy((MEAN,), SCALE), steps=1),
        teacher.fork(),
        reference=StudentScore(),
        advantage=GroupAdvantage("group"),
        surrogate_stages=FinalStage(2),
        surrogate_regularization=0.0,
        trust_region=NoTrustRegion(),
        runaway=None,
        **options,
    )
    means = Means()
    rates = {"reference": 0.1, "surrogate": 0.1, "fake": 0.0, "generator": 0.0}
    AlignmentLoop(
        objective,
        MirroredStage(256),
        place,
        Prompts(["a"]),
        prompts_per_step=1,
        optimizers={role: lambda p, rate=rate: torch.optim.SGD(p, lr=rate) for role, rate in rates.items()},
        max_grad_norm=None,
        hooks=[means],
    ).run(120)
    return tuple(float(torch.stack(trail[-60:]).mean()) for trail in (means.surrogate, means.reference))


def test_the_surrogate_is_the_students_law_tilted_by_the_advantage():
    surrogate, reference = learned(group_objective=RewardWeighted(STRENGTH))
    assert reference == pytest.approx(MEAN, abs=0.03)
    # (1 + c (x - m) / s) N(x; m, s^2) has the mean m + c s
    assert surrogate - reference == pytest.approx(STRENGTH * SCALE, abs=0.03)


def test_equal_advantages_leave_the_surrogate_at_the_reference():
    flat = torch.zeros(4, dtype=torch.float64)
    error, group = torch.rand(4, dtype=torch.float64), torch.tensor([0, 0, 1, 1])
    assert torch.equal(RewardWeighted(0.5)(error, error, flat, group), error)
    far = torch.tensor([-3.0, 3.0, -1.0, 1.0], dtype=torch.float64)
    assert torch.equal(RewardWeighted(0.5)(error, error, far, group), error * torch.tensor([0.0, 2.5, 0.5, 1.5], dtype=torch.float64))


def test_the_student_score_is_a_role_and_one_with_an_equal_baseline():
    student = TDMPolicy(LinearPolicy((MEAN,), SCALE), steps=1)
    teacher = GaussianMixturePolicy(torch.zeros(1, 1, dtype=torch.float64), SCALE).fork()
    objective = SurrogateReward(student, teacher, reference=StudentScore(), baseline=StudentScore())
    assert set(objective.policies()) == {"generator", "fake", "surrogate", "old_surrogate", "teacher", "reference"}
    assert objective._beside.baseline is objective._beside.reference
    assert list(objective.phases()[0].trains) == ["reference", "surrogate", "fake", "generator"]
    apart = SurrogateReward(student, teacher, reference=StudentScore())
    assert apart._beside.baseline is apart.teacher


@pytest.mark.parametrize("reference", [FrozenTeacher(), MovingReference()], ids=lambda rule: type(rule).__name__)
def test_a_baseline_that_nobody_would_train_is_refused(reference):
    student = TDMPolicy(LinearPolicy((MEAN,), SCALE), steps=1)
    teacher = GaussianMixturePolicy(torch.zeros(1, 1, dtype=torch.float64), SCALE).fork()
    with pytest.raises(
        ValueError,
        match=rf"^SurrogateReward\.baseline StudentScore must be the reference as well, .* is {type(reference).__name__}\. "
        r"Give reference=StudentScore\(\) too\.$",
    ):
        SurrogateReward(student, teacher, reference=reference, baseline=StudentScore())
