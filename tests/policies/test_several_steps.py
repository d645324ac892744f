"""One set of weights as a student of several numbers of steps."""

import json
import re

import pytest
import torch

from diffalign import Prompt
from diffalign.config import parse_text
from diffalign.core import CheckpointError, Guided, Progress, ShiftedGrid, Streams
from diffalign.core.unessential import say_once
from diffalign.policies import FlowMatchingPolicy, TDMPolicy
from diffalign.policies.encodings import Encodings
from diffalign.samplers import DeterministicSampler
from diffalign.testing import TinyPolicy

PROMPTS = [Prompt("a red cube", {"count": 1}), Prompt("two blue stars")]
GRIDS = {1: [1.0, 0.0], 2: [1.0, 0.6, 0.0], 4: [1.0, 0.9, 0.75, 0.5, 0.0]}
LISTS = [GRIDS[2], GRIDS[4], GRIDS[1]]
TAG = " in {steps} steps"


def student(**options):
    return TDMPolicy(TinyPolicy((2, 2)), **{"steps": 4, "also": [1, 2], "grid": LISTS, "tag": TAG, **options})


def rolled(policy, steps):
    with torch.no_grad():
        return DeterministicSampler(steps, samples=3).sample(policy, policy.encode(PROMPTS), Progress(0, 1), Streams(5))


@pytest.mark.parametrize("steps", GRIDS)
def test_each_number_of_steps_has_its_sigmas_and_its_tag(steps):
    policy = student()
    view = policy.at(steps)
    assert view.steps == steps
    assert view.step_counts[0] == steps
    assert set(view.step_counts) == {1, 2, 4}
    assert torch.equal(view.sigmas(steps), torch.tensor(GRIDS[steps]))
    condition = view.encode(PROMPTS)
    assert condition.prompts == tuple(PROMPTS)
    assert condition.prompts[0].metadata == {"count": 1}
    told = policy.policy.encode([Prompt(f"{prompt} in {steps} steps") for prompt in PROMPTS])
    assert torch.equal(condition.tensors["embedding"], told.tensors["embedding"])
    assert rolled(view, steps).samples.shape == (6, 2, 2)
    assert policy.steps == 4  # a view changes nothing of what is looked at


@pytest.mark.parametrize("grid", [None, ShiftedGrid(3.0)])
def test_a_rule_gives_the_grid_of_each(grid):
    policy = student(grid=grid)
    for steps in (1, 2, 4):
        expected = policy.policy.sigmas(steps) if grid is None else grid(steps)
        assert torch.equal(policy.at(steps).sigmas(steps), expected)


def test_a_view_has_the_same_weights_and_counts_the_same_rows():
    policy = student()
    view = policy.at(2)
    assert policy.at(4) is policy
    assert view.at(4).steps == 4
    assert all(mine is its for mine, its in zip(policy.parameters(), view.parameters(), strict=True))
    rolled(view, 2)
    assert policy.counter.rows == 2 * 6
    assert view.base_digest() == policy.base_digest()


@pytest.mark.parametrize("steps", GRIDS)
def test_rollout_of_a_view_and_replay_by_the_student_agree_bit_for_bit(steps):
    policy = student()
    forest = rolled(policy.at(steps), steps)
    condition = forest.condition.select(forest.group)
    for level in range(steps):
        here, following = forest.latents[forest.paths[:, level]], forest.latents[forest.paths[:, level + 1]]
        sigma, sigma_next = (forest.sigmas[place].expand(len(here)) for place in (level, level + 1))
        assert torch.equal(policy.transition(here, sigma, sigma_next, condition, torch.zeros(len(here))).mean, following)
        assert torch.equal(policy.at(steps).stage(here, level, condition)[0], following)


def test_forks_serve_the_same_numbers_and_a_pristine_one_is_told_none():
    policy = student()
    twin, base = policy.at(2).fork(trainable=True), policy.fork(pristine=True)
    assert (twin.steps, twin.step_counts) == (2, (2, 4, 1))
    assert torch.equal(rolled(twin.at(4), 4).samples, rolled(policy, 4).samples)
    assert (base.tag, base.step_counts) == ("", (4,))


def test_a_guided_student_hands_its_views_on_with_a_null_condition_of_their_own():
    guided = Guided(student(), 2.0, "bad")
    view = guided.at(2)
    assert guided.at(4) is guided
    assert view.step_counts == (2, 4, 1)
    fresh = Guided(student().at(2), 2.0, "bad")
    assert torch.equal(rolled(view, 2).samples, rolled(fresh, 2).samples)
    assert not torch.equal(view._guidance.null.tensors["embedding"], guided._guidance.null.tensors["embedding"])


def test_a_policy_of_any_number_of_steps_is_its_own_view():
    policy = TinyPolicy((2, 2))
    assert policy.at(3) is policy
    assert policy.step_counts == Guided(policy, 2.0).step_counts == ()
    assert student(also=(), grid=None).step_counts == (4,)


def moved(policy):
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter += 0.5
    return policy


@pytest.mark.parametrize("main", [None, 1, 2, 4])
def test_a_saved_student_comes_back_with_all_and_the_main_one_that_is_asked_for(tmp_path, main):
    policy = moved(student())
    policy.save(str(tmp_path))
    assert json.loads((tmp_path / "student.json").read_text())["also"] == [GRIDS[1], pytest.approx(GRIDS[2])]
    again = TDMPolicy.from_saved(TinyPolicy((2, 2)), str(tmp_path), steps=main)
    assert again.steps == (main or 4)
    for steps in GRIDS:
        assert torch.equal(rolled(again.at(steps), steps).samples, rolled(policy.at(steps), steps).samples)


def test_a_number_that_a_saved_student_does_not_serve_is_refused_naming_both(tmp_path):
    student().save(str(tmp_path))
    with pytest.raises(CheckpointError, match="must have steps = 3, as asked; it was made with 4, 1 and 2"):
        TDMPolicy.from_saved(TinyPolicy((2, 2)), str(tmp_path), steps=3)


def test_the_file_of_a_student_from_before_is_read(tmp_path):
    student(also=(), grid=GRIDS[4]).save(str(tmp_path))
    about = json.loads((tmp_path / "student.json").read_text())
    del about["also"]
    (tmp_path / "student.json").write_text(json.dumps(about))
    assert TDMPolicy.from_saved(TinyPolicy((2, 2)), str(tmp_path)).step_counts == (4,)


BAD = {
    "no tag": ({"tag": ""}, "TDMPolicy.tag must name the number of steps, .*: the weights serve 4, 1 and 2 steps, .*; got ''"),
    "a tag without the number": ({"tag": " fast"}, "TDMPolicy.tag must name the number of steps.*got ' fast'"),
    "another placeholder": ({"tag": " in {count}"}, "TDMPolicy.tag may have only the placeholder {steps}"),
    "a broken placeholder": ({"tag": " in {steps"}, "TDMPolicy.tag may have only the placeholder {steps}"),
    "the main one again": ({"also": [1, 4]}, re.escape("TDMPolicy.also must hold numbers of steps from 1 to 8, each once, none of them")),
    "twice": ({"also": [1, 1]}, r"each once.*got \[1, 1\]"),
    "none": ({"also": [0]}, r"from 1 to 8.*got \[0\]"),
    "nine": ({"also": [9]}, r"from 1 to 8.*got \[9\]"),
    "half": ({"also": [1.5]}, r"from 1 to 8.*got \[1.5\]"),
    "one list": ({"grid": GRIDS[4]}, "TDMPolicy.grid must be a function, or a list of lists of sigmas, one for each of 4, 1 and 2 steps"),
    "a list missing": ({"grid": LISTS[:2]}, "for each of 4, 1 and 2 steps; got lists of 3 and 5 sigmas"),
    "a list too many": ({"grid": [*LISTS, [1.0, 0.5, 0.2, 0.0]]}, "got lists of 3, 5, 2 and 4 sigmas"),
    "lists and numbers": ({"grid": [1.0, GRIDS[2], GRIDS[4]]}, "got lists of 0, 3 and 5 sigmas"),
    "a list that does not fit": (
        {"grid": [GRIDS[1], [1.0, 0.6, 0.1], GRIDS[4]]},
        r"TDMPolicy.grid must give 3 sigmas from at most 1 decreasing to 0; got",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_work_is_refused_at_once(case):
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        student(**options)


def test_a_number_that_is_not_served_and_a_grid_of_another_view_are_refused():
    with pytest.raises(ValueError, match="this student serves 4, 1 and 2 steps; 3 steps were asked for"):
        student().at(3)
    with pytest.raises(ValueError, match="this student serves 4 steps; 2 steps were asked for"):
        student(also=(), grid=None).at(2)
    with pytest.raises(ValueError, match=r"Give the sampler steps = 4. Its weights also serve 1 and 2 steps, by student.at"):
        rolled(student(), 2)


RUN = """
policy:
  class_path: TDMPolicy
  init_args:
    policy: {class_path: GaussianMixturePolicy, init_args: {means: [[0.0, 1.0]], scale: 0.5}}
    also: [2]
    grid: [[1.0, 0.5, 0.0], [1.0, 0.8, 0.6, 0.3, 0.0]]
    tag: " in {steps} steps"
objective: {class_path: DGPO, init_args: {levels: 1}}
sampler: {class_path: DrawnSteps, init_args: {steps: [2, 4], samples: 3}}
rewards: {class_path: JPEGCompressibility}
prompts: {class_path: Prompts, init_args: {prompts: [a]}}
total: 1
"""


def test_a_run_file_says_it_all():
    run = parse_text(RUN)
    assert parse_text(run.yaml()).yaml() == run.yaml()
    loop = run.build()
    assert loop.objective.policy.step_counts == (4, 2)
    assert loop.objective.policy.at(2).sigmas(2).tolist() == [1.0, 0.5, 0.0]
    assert list(loop.sampler.steps) == [2, 4]


def reader(tag=TAG, also=(1,)):
    """A student whose text encoder reads 16 tokens."""
    return TDMPolicy(FlowMatchingPolicy.from_pretrained("shapeworld", max_sequence_length=16), steps=4, also=also, tag=tag)


def reds(count):
    return Prompt("red " * count + "circle")


def test_a_prompt_that_hides_the_tag_is_refused_before_it_is_drawn():
    policy = reader()
    policy.require([Prompt("one red circle"), reds(11)])  # the number is still read, the word behind it is not
    with pytest.raises(ValueError, match=r"after the prompt '(red )+circle' it is cut off, so that 4 and 1 steps are one. Shorten"):
        policy.require([Prompt("one red circle"), reds(12)])
    hidden, read = (
        all(torch.equal(tensor, policy.at(1).encode([prompt]).tensors[name]) for name, tensor in policy.encode([prompt]).tensors.items())
        for prompt in (reds(12), reds(11))
    )
    assert hidden
    assert not read


def test_many_prompts_that_are_cut_off_behind_the_number_are_encoded_together(monkeypatch):
    policy, encode, calls = reader(also=(1, 2)), Encodings._encoded, []
    monkeypatch.setattr(Encodings, "_encoded", lambda self, texts, negative: calls.append(len(texts)) or encode(self, texts, negative))
    prompts = [Prompt("red " * 10 + f"circle {number % 10}") for number in range(300)]  # ten texts, whose last word hides part of the tag
    policy.require(prompts)
    assert calls == [10, 10, 10]
    policy.require(prompts)
    assert len(calls) == 3
    with pytest.raises(ValueError, match=r"after the prompt '(red )+circle' it is cut off, so that 4 and 1 steps are one"):
        policy.require([*prompts, reds(12)])


def test_the_policy_inside_is_asked_about_prompts_with_their_tags(capsys):
    class Asked(TinyPolicy):
        def require(self, prompts):
            asked.append([(str(prompt), dict(prompt.metadata), prompt.source) for prompt in prompts])

    asked = []
    prompt = Prompt("a red cube", {"count": 1}, "mine")
    TDMPolicy(Asked((2, 2)), steps=4, also=[1, 2], grid=LISTS, tag=TAG).require([prompt])
    assert asked == [[(f"a red cube in {steps} steps", {"count": 1}, "mine")] for steps in (4, 1, 2)]
    say_once.cache_clear()
    reader(also=()).require([reds(12)])  # it fits, and its tag does not; one number of steps needs no telling
    assert "1 of 1 prompts are longer than the policy reads" in capsys.readouterr().err
