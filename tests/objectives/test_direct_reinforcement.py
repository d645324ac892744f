"""Distillation with DGPO's loss on the student: the sum of the two, and what is refused."""

import pytest
import torch
from few_step_cases import assert_same_gradients, batch_of, flat, gradients, moved, tiny_student

from diffalign import AlignmentLoop
from diffalign.core import Linear, Prompt
from diffalign.objectives import DGPO, DirectReinforcement, TrajectoryDistributionMatching
from diffalign.objectives.few_step import InOrder, Squared
from diffalign.policies import TDMPolicy
from diffalign.prompts import Prompts
from diffalign.samplers import DeterministicSampler, DrawnSteps
from diffalign.testing import TinyPolicy, channel_reward


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


def test_its_reference_is_the_one_that_is_given():
    student = moved(tiny_student())
    reference = moved(student.fork(trainable=True), 0.2).fork()
    batch = batch_of(student)
    one, three = (gradients(direct(student, reference=reference, weight=weight), batch)["generator"] for weight in (1.0, 3.0))
    preferred = gradients(DGPO(student, reference, levels=2, kl=0.1), batch)["policy"]
    assert_same_gradients(
        {"generator": {name: (value - one[name]) / 2 for name, value in three.items()}}, {"generator": preferred}, tolerance=1e-8
    )
    assert direct(student, reference=reference).policies()["reference"] is reference


def test_the_budget_changes_no_gradient():
    student = moved(tiny_student())
    batch = batch_of(student)
    assert_same_gradients(gradients(direct(student, rows=5), batch), gradients(direct(student), batch))


def test_the_budget_bounds_the_rows_of_both_losses(monkeypatch):
    student = moved(tiny_student())
    objective, batch, rows = direct(student), batch_of(student), []
    called = TinyPolicy.velocity
    monkeypatch.setattr(TinyPolicy, "velocity", lambda self, latents, *told: rows.append(len(latents)) or called(self, latents, *told))
    gradients(objective, batch)
    assert max(rows) > 5
    rows.clear()
    objective.rows = 5  # as the loop does when memory runs out
    gradients(objective, batch)
    assert max(rows) == 5


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
        (DeterministicSampler(4, samples=1), 2, "DirectReinforcement needs at least 2 samples per prompt to compare; the sampler draws 1"),
        (DrawnSteps((4,), samples=1), 2, "DirectReinforcement needs at least 2 samples per prompt to compare; the sampler draws 1"),
        (
            DeterministicSampler(4, samples=3),
            9,
            r"DirectReinforcement\.levels must be at most .* of the student from sigma_min 0\.5 on, 4 of its 4; got 9\.",
        ),
    ],
    ids=["one sample", "one sample of drawn steps", "few levels"],
)
def test_what_dgpo_would_refuse_in_the_first_update_is_refused_before_anything_is_drawn(sampler, levels, message):
    objective = DirectReinforcement(tiny_student(), levels=levels)
    with pytest.raises(ValueError, match=message):
        AlignmentLoop(objective, sampler, channel_reward, Prompts([Prompt("a")]), prompts_per_step=1)


def test_the_defaults_take_a_student_of_four_even_steps():
    student = TDMPolicy(TinyPolicy((2, 2), shift=1.0), steps=4)  # sigma 1, 0.75, 0.5: three levels from 0.5 on
    with pytest.raises(ValueError, match=r"3 of its 4; got 4"):
        AlignmentLoop(DirectReinforcement(student, levels=4), DeterministicSampler(4, samples=3), channel_reward, Prompts(["a"]))
    loop = AlignmentLoop(DirectReinforcement(student), DeterministicSampler(4, samples=3), channel_reward, Prompts(["a"]))
    loop.run(1)


def test_the_grid_with_the_fewest_levels_of_a_student_of_several_is_named():
    student = TDMPolicy(TinyPolicy((2, 2), shift=1.0), steps=4, also=(2,), tag=" {steps}")  # two levels of the grid of two, 1 and 0.5
    with pytest.raises(ValueError, match=r"DirectReinforcement\.levels .* from sigma_min 0\.5 on, 2 of its 2; got 3"):
        AlignmentLoop(DirectReinforcement(student, levels=3), DrawnSteps((4, 2), samples=3), channel_reward, Prompts(["a"]))


def test_a_wrong_decay_is_said_of_it_too():
    objective = DirectReinforcement(tiny_student(), decay=Linear(2.0, 2.0, 1))
    with pytest.raises(ValueError, match=r"^DirectReinforcement\.decay must lie in \[0, 1\]; got 2"):
        gradients(objective, batch_of(objective.policy))
