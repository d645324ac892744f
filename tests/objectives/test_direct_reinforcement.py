"""Distillation with DGPO's loss on the student: the sum of the two, and what is refused."""

import pytest
import torch
from few_step_cases import assert_same_gradients, batch_of, flat, gradients, moved, tiny_student

from diffalign import AlignmentLoop
from diffalign.core import Prompt
from diffalign.objectives import DGPO, DirectReinforcement, TrajectoryDistributionMatching
from diffalign.objectives.few_step import InOrder, Squared
from diffalign.prompts import Prompts
from diffalign.samplers import DeterministicSampler, DrawnSteps
from diffalign.testing import channel_reward


def direct(student, **options):
    objective = DirectReinforcement(student, levels=2, kl=0.1, **options)
    moved(objective.fake, 0.1)
    return objective


def test_its_gradient_is_the_sum():
    student = moved(tiny_student())
    batch = batch_of(student)
    whole = gradients(direct(student, weight=3.0), batch)
    matching = TrajectoryDistributionMatching(student, fake_regularization=0.02, distance=Squared())
    moved(matching.fake, 0.1)
    alone = gradients(matching, batch)
    preferred = gradients(DGPO(student, levels=2, kl=0.1), batch)["policy"]
    summed = {name: value + 3.0 * preferred[name] for name, value in alone["generator"].items()}
    assert float(flat(preferred).norm()) > 1e-6
    assert_same_gradients(whole, {"fake": alone["fake"], "generator": summed})


def test_the_budget_changes_no_gradient():
    student = moved(tiny_student())
    batch = batch_of(student)
    assert_same_gradients(gradients(direct(student, rows=5), batch), gradients(direct(student), batch))


def test_a_run_moves_both_roles_and_the_old_weights():
    objective = direct(moved(tiny_student()), plan=InOrder())
    named = objective.policies()
    assert set(named) == {"generator", "fake", "teacher", "reference", "old"}
    before = {name: flat(dict(policy.named_parameters())).clone() for name, policy in named.items()}
    AlignmentLoop(objective, DeterministicSampler(4, samples=3), channel_reward, Prompts([Prompt("a")]), prompts_per_step=1).run(1)
    after = {name: flat(dict(policy.named_parameters())) for name, policy in named.items()}
    assert {name for name in named if not torch.equal(before[name], after[name])} == {"generator", "fake", "old"}


def test_a_weight_of_nothing_is_refused():
    with pytest.raises(ValueError, match="weight"):
        DirectReinforcement(tiny_student(), weight=0.0)


@pytest.mark.parametrize(
    ("sampler", "levels", "message"),
    [
        (DeterministicSampler(4, samples=1), 2, "DGPO needs at least 2 samples per prompt to compare; the sampler draws 1"),
        (DrawnSteps((4,), samples=1), 2, "DGPO needs at least 2 samples per prompt to compare; the sampler draws 1"),
        (DeterministicSampler(4, samples=3), 9, r"DGPO\.levels must be at most the number of noise levels of the rollout"),
    ],
    ids=["one sample", "one sample of drawn steps", "few levels"],
)
def test_what_dgpo_would_refuse_in_the_first_update_is_refused_before_anything_is_drawn(sampler, levels, message):
    objective = DirectReinforcement(tiny_student(), levels=levels)
    with pytest.raises(ValueError, match=message):
        AlignmentLoop(objective, sampler, channel_reward, Prompts([Prompt("a")]), prompts_per_step=1)
