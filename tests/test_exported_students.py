"""The card of a few-step student that saves itself: its code gives the same student again."""

import re
from pathlib import Path

import pytest
import torch

from diffalign.core import Guided, Policy, Progress, Prompt, Streams
from diffalign.digits import DigitsPolicy
from diffalign.export import export
from diffalign.policies import TDMPolicy
from diffalign.samplers import DeterministicSampler

TAG = " in {steps} steps"


def code_of(policy: Policy, folder: Path) -> str:
    """The code on the card of the exported policy."""
    card = (export(policy, folder, "merged") / "README.md").read_text()
    return next(iter(re.findall(r"```python\n(.*?)```", card, re.S)))


def built(policy: Policy, folder: Path, patch: pytest.MonkeyPatch) -> Policy:
    """The policy that the code on its card builds, in the folder of the weights."""
    code = code_of(policy, folder)
    patch.chdir(folder)
    names: dict[str, object] = {}
    exec(code, names)
    again = names["policy"]
    assert isinstance(again, Policy)
    return again


def pictures(policy: Policy, steps: int) -> torch.Tensor:
    with torch.no_grad():
        condition = policy.encode([Prompt("a seven"), Prompt("a two")])
        return DeterministicSampler(steps, 2).sample(policy, condition, Progress(0, 1), Streams(3)).samples


class Untagged(DigitsPolicy):
    """Digits policy that reads prompts up to a tag."""

    def encode(self, prompts):
        return super().encode([Prompt(prompt.partition(" in ")[0]) for prompt in prompts])


@pytest.fixture
def digits() -> DigitsPolicy:
    return DigitsPolicy.from_pretrained("digits", device="cpu")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"steps": 4}, "policy = TDMPolicy(policy, steps=4, grid=[1, 0.75, 0.5, 0.25, 0])  # 4 steps on these sigmas, and no others"),
        ({"steps": 2, "grid": [1.0, 0.7, 0.0]}, "policy = TDMPolicy(policy, steps=2, grid=[1, 0.7, 0])  # 2 steps on these sigmas, and no"),
        ({"steps": 1}, "policy = TDMPolicy(policy, steps=1, grid=[1, 0])  # 1 step on these sigmas, and no others"),
    ],
)
def test_the_code_on_a_card_builds_the_student(digits, tmp_path, monkeypatch, options, line):
    student = TDMPolicy(digits, **options)
    assert line in code_of(student, tmp_path)
    again = built(student, tmp_path, monkeypatch)
    steps = options["steps"]
    assert (type(again), again.step_counts, again.sigmas(steps).tolist()) == (TDMPolicy, (steps,), student.sigmas(steps).tolist())
    assert torch.equal(pictures(again.to("cpu"), steps), pictures(student, steps))


def test_the_tag_and_all_numbers_of_steps_are_named(digits, tmp_path):
    code = code_of(TDMPolicy(Untagged(digits.network), steps=4, also=[1, 2], tag=TAG), tmp_path)
    assert (
        'TDMPolicy(policy, steps=4, grid=[[1, 0.75, 0.5, 0.25, 0], [1, 0], [1, 0.5, 0]], tag=" in {steps} steps", also=[1, 2])'
        "  # 4 or 1 or 2 steps on these sigmas, and no others"
    ) in code


def test_guidance_around_it_is_named(digits, tmp_path, monkeypatch):
    again = built(Guided(digits, digits.no_guidance, "blurred"), tmp_path, monkeypatch)
    assert (type(again), again.scale, again.negative) == (Guided, digits.no_guidance, "blurred")


def test_a_policy_that_is_no_student_is_loaded_alone(digits, tmp_path):
    code = 'from diffalign.digits import DigitsPolicy\n\npolicy = DigitsPolicy.from_pretrained(".")  # this folder\n'
    assert code_of(digits, tmp_path) == code
