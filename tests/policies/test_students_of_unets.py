"""Few-step students of UNets, whose networks know only the levels of their training."""

import pytest
import torch

from diffalign import Prompt
from diffalign.core import Euler, Guided, Progress, ShiftedGrid, Streams
from diffalign.objectives.few_step import Overlap, ShiftedTime
from diffalign.objectives.few_step.matching import Queries
from diffalign.objectives.few_step.stages import Rows
from diffalign.policies import FlowMatchingPolicy, TDMPolicy
from diffalign.samplers import DeterministicSampler

UNETS = ("sd15", "sdxl")
PROMPTS = [Prompt("a red cube"), Prompt("two green cats")]
FULL = [1.0, 0.75, 0.5, 0.25, 0.0]


def rolled(policy, steps=4):
    with torch.no_grad():
        return DeterministicSampler(steps, samples=2).sample(policy, policy.encode(PROMPTS), Progress(0, 1), Streams(5))


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("grid", [FULL, [0.9, 0.6, 0.4, 0.2, 0.0], ShiftedGrid(3.0)], ids=["from 1", "between", "shifted"])
def test_a_given_grid_is_refused_as_by_the_policy_itself(name, grid, load):
    policy = load(name, max_sequence_length=None)
    with pytest.raises(ValueError, match=r"grid must be left out for a StableDiffusion(XL)?: its network knows only the levels") as alone:
        FlowMatchingPolicy(policy.network, policy.family, grid=ShiftedGrid(3.0))
    for inner in (policy, Guided(policy, 3.0)):
        with pytest.raises(ValueError) as refused:  # noqa: PT011
            TDMPolicy(inner, 4, grid=grid)
        assert str(refused.value) == str(alone.value)
    with pytest.raises(ValueError, match="grid must be left out"):
        TDMPolicy(policy, 4, grid=[FULL, [1.0, 0.5, 0.0]], also=[2], tag=" in {steps} steps")


@pytest.mark.parametrize("name", UNETS)
def test_a_student_has_the_grid_of_its_policy_and_its_trajectories(name, load):
    policy = load(name, max_sequence_length=None, kernel=Euler())
    student = TDMPolicy(policy, 4)
    assert torch.equal(student.sigmas(4), policy.sigmas(4))
    assert (float(student.sigmas(4)[-1]) > 0) == (name == "sd15")  # its scheduler ends at the first training level
    forest = rolled(student)
    assert forest.samples.isfinite().all()
    assert torch.equal(forest.samples, rolled(policy).samples)
    assert torch.equal(policy.decode(forest.samples), policy.decode(rolled(policy).samples))
    condition = forest.condition.select(forest.group)
    for level in range(4):
        here, following = forest.latents[forest.paths[:, level]], forest.latents[forest.paths[:, level + 1]]
        with torch.no_grad():
            got, clean = student.stage(here, level, condition)
            expected = student.predict_clean(here, student.sigmas(4)[level].expand(len(here)), condition)
        torch.testing.assert_close(got, following)
        torch.testing.assert_close(clean, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", UNETS)
def test_forks_and_saved_students_keep_it(name, load, tmp_path):
    policy = load(name, max_sequence_length=None)
    student = TDMPolicy(policy, 4, tag=" in {steps} steps", also=[2])
    for twin in (student.fork(trainable=True), student.fork(pristine=True), student.at(2).fork()):
        assert torch.equal(twin.sigmas(twin.steps), policy.sigmas(twin.steps))
    student.save(str(tmp_path))
    again = TDMPolicy.from_saved(load(name, max_sequence_length=None), str(tmp_path))
    assert again.step_counts == (4, 2)
    assert torch.equal(again.sigmas(4), student.sigmas(4))
    assert torch.equal(rolled(again).samples, rolled(student).samples)


@pytest.mark.parametrize("name", UNETS)
def test_teachers_are_asked_at_no_more_noise_than_they_know(name, load):
    """By default every stage is noised up to full noise, at which such a network has no clean prediction."""
    policy = load(name, max_sequence_length=None, kernel=Euler())
    highest = float(policy.sigmas(4)[0])
    assert highest < 1
    forest = rolled(TDMPolicy(policy, 4))
    rows = Rows.of(forest, [0, 1, 2, 3])
    taus, _ = Queries(Overlap(), ShiftedTime(), shared="sample")(rows, Streams(0), "q")
    assert float(taus.max()) <= highest
    assert float(taus[rows.stage == 3].max()) > float(forest.sigmas[3]) + 0.02, "not only within its own stage"
