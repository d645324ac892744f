"""A number of steps that is drawn at each training step."""

from collections import Counter

import attrs
import pytest
import torch

from diffalign import Prompt
from diffalign.core import Condition, Overlapped, Progress, Sequential, Streams
from diffalign.core.joining import join
from diffalign.core.rollout import pieces
from diffalign.objectives import DGPO
from diffalign.policies import GaussianMixturePolicy, TDMPolicy
from diffalign.prompts import Prompts
from diffalign.samplers import DeterministicSampler, DrawnSteps
from diffalign.testing import TinyPolicy, channel_reward, check_sampler

PROMPTS = [Prompt("a red cube"), Prompt("two blue stars"), Prompt("three green disks")]
SAMPLER = DrawnSteps((1, 2, 4), samples=3)


def student():
    return TDMPolicy(TinyPolicy((2, 2), dtype=torch.float64), steps=4, also=[1, 2], tag=" in {steps} steps")


def condition_of(policy, index=(0, 1, 2)):
    condition = policy.encode([PROMPTS[i] for i in index])
    return Condition(condition.prompts, torch.tensor(index), condition.tensors)


def drawn(policy, condition, step, sampler=SAMPLER):
    with torch.no_grad():
        return sampler.sample(policy, condition, Progress(step, 100), Streams(3, step))


def step_with(steps):
    return next(step for step in range(100) if SAMPLER.drawn(Streams(3, step)) == steps)


def test_it_keeps_the_contract_of_samplers():
    for steps in ((1,), (1, 2, 4)):
        assert check_sampler(DrawnSteps(steps, samples=3))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_batch_is_that_of_the_student_of_the_drawn_number(steps):
    policy, step = student(), step_with(steps)
    got = drawn(policy, condition_of(policy), step)
    view = policy.at(steps)
    with torch.no_grad():
        expected = DeterministicSampler(steps, 3).sample(view, condition_of(view), Progress(step, 100), Streams(3, step))
    assert torch.equal(got.sigmas, view.sigmas(steps))
    assert torch.equal(got.latents, expected.latents)
    assert torch.equal(got.paths, expected.paths)
    assert torch.equal(got.condition.tensors["embedding"], expected.condition.tensors["embedding"])
    assert got.condition.ids.tolist() == [0, 1, 2]
    assert got.condition.prompts == tuple(PROMPTS)
    assert got.paths.shape[1] == steps + 1


def test_numbers_are_drawn_by_seed_and_step_alone_and_evenly():
    numbers = [SAMPLER.drawn(Streams(3, step)) for step in range(600)]
    assert numbers == [attrs.evolve(SAMPLER, samples=9).drawn(Streams(3, step)) for step in range(600)]
    assert numbers != [SAMPLER.drawn(Streams(4, step)) for step in range(600)]
    assert all(abs(count - 200) < 50 for count in Counter(numbers).values())  # 4.3 standard deviations
    assert Counter(numbers).keys() == {1, 2, 4}
    twice = Counter(DrawnSteps((1, 4, 4)).drawn(Streams(3, step)) for step in range(600))
    assert abs(twice[4] - 400) < 50


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_processes_draw_the_same_number_and_the_rows_of_one(steps):
    policy, step = student(), step_with(steps)
    whole = drawn(policy, condition_of(policy), step)
    for share in ((0, 2), (1,)):
        mine = drawn(policy, condition_of(policy, share), step)
        assert torch.equal(mine.sigmas, whole.sigmas)
        rows = torch.isin(whole.group, torch.tensor(share))
        torch.testing.assert_close(mine.samples, whole.samples[rows], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_pieces_of_the_prompts_keep_the_condition_they_were_sampled_under(steps):
    policy, step = student(), step_with(steps)
    condition = condition_of(policy)
    whole = drawn(policy, condition, step)
    joined = join(condition, [drawn(policy, piece, step) for piece in pieces(condition, 2)])
    assert torch.equal(joined.condition.tensors["embedding"], whole.condition.tensors["embedding"])
    assert joined.condition.ids.tolist() == [0, 1, 2]
    assert joined.condition.prompts == whole.condition.prompts
    torch.testing.assert_close(joined.latents, whole.latents, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rollout", [Sequential(1), Overlapped(1)], ids=["sequential", "overlapped"])
def test_a_run_in_pieces_is_the_run(rollout):
    from diffalign import AlignmentLoop

    runs = []
    for how in (Sequential(), rollout):
        policy = student()
        loop = AlignmentLoop(
            DGPO(policy, levels=1),
            SAMPLER,
            channel_reward,
            Prompts(PROMPTS, shuffle=False),
            prompts_per_step=3,
            optimizers={"default": lambda parameters: torch.optim.SGD(parameters, lr=0.1)},
            rollout=how,
        )
        loop.run(4)
        runs.append(torch.cat([parameter.detach().flatten() for parameter in policy.trainable_parameters().values()]))
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-9, atol=1e-9)


def test_ragged_conditions_of_pieces_are_padded_as_one():
    def ragged(texts, longest):
        rows = [torch.arange(1, len(text) + 1).double() for text in texts]
        tensor = torch.stack([torch.nn.functional.pad(row, (0, longest - len(row))) for row in rows])
        return Condition(
            tuple(map(Prompt, texts)), torch.arange(len(texts)), {"tokens": tensor, "lengths": torch.tensor([*map(len, texts)])}
        )

    forest = drawn(student(), condition_of(student(), (0,)), 0)
    parts = [attrs.evolve(forest, condition=ragged(texts, longest)) for texts, longest in ((["abc"], 3), (["abcde"], 5))]
    joined = join(condition_of(student(), (0, 1)), parts)
    assert torch.equal(joined.condition.tensors["tokens"], ragged(["abc", "abcde"], 5).tensors["tokens"])
    assert joined.condition.tensors["lengths"].tolist() == [3, 5]


def test_the_plan_of_a_run_has_room_for_the_most_steps():
    assert SAMPLER.branching() == DeterministicSampler(4, 3).branching()


def test_the_outline_names_the_grids_of_all_numbers():
    policy = student()
    outline = DrawnSteps((4, 1, 2, 4), samples=3).outline(policy)
    assert outline.grids[0] is outline.sigmas
    assert [grid.tolist() for grid in outline.grids] == [policy.at(count).sigmas(count).tolist() for count in (1, 2, 4)]
    assert len(DeterministicSampler(4, 3).outline(policy).grids) == 1
    with pytest.raises(ValueError, match="this student serves 4, 1 and 2 steps; 3 steps were asked for"):
        DrawnSteps((4, 3)).outline(policy)


@pytest.mark.parametrize("steps", [(), (0, 2), (1.5,)])
def test_numbers_that_are_none_are_refused(steps):
    with pytest.raises(ValueError, match=r"DrawnSteps\.steps must hold numbers of steps of at least 1; got"):
        DrawnSteps(steps)


def test_a_number_that_the_student_does_not_serve_is_refused_before_it_is_drawn():
    policy, step = student(), step_with(4)
    with pytest.raises(ValueError, match="this student serves 4, 1 and 2 steps; 3 steps were asked for"):
        drawn(policy, condition_of(policy), step, DrawnSteps((4, 4, 4, 4, 4, 4, 4, 3)))


def test_a_network_that_does_not_read_the_tag_is_refused():
    policy = TDMPolicy(GaussianMixturePolicy([[0.0, 1.0]], 0.5), steps=4, also=[1, 2], tag=" in {steps} steps")
    with pytest.raises(ValueError, match="'a red cube' is encoded alike with the tag of 2 steps and of another number"):
        drawn(policy, condition_of(policy), step_with(2))
