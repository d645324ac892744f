"""Rewards that need more of a prompt than a caption, and aggregations, on the command line of `check-part`."""

import json
import re
import sys
from pathlib import Path

import pytest

from diffalign.cli import main

GUIDE = Path(__file__).parents[2] / "docs" / "rewards.md"

AGGREGATIONS = """
import torch
from diffalign.core import Aggregation

class Softmin(Aggregation):
    def __call__(self, parts, group): return -torch.logsumexp(-torch.stack([parts[name] for name in parts]), dim=0)

class Needy(Softmin):
    def __init__(self, temperature): self.temperature = temperature

softmin = Softmin()

def make(): return Softmin()

def plain(parts, group): return sum(parts.values())

def plan():
    from diffalign.samplers import FixedPlan
    return FixedPlan()
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The reward of the guide, with the file of prompts that it shows."""
    code = next(code for code in re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.S) if "class Darkness" in code)
    (tmp_path / "guided.py").write_text(code)
    (tmp_path / "totals.py").write_text(AGGREGATIONS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("guided", "totals"):
        sys.modules.pop(name, None)


def write(file, darknesses):
    file.write_text("".join(json.dumps({"prompt": f"room {place}", **more}) + "\n" for place, more in enumerate(darknesses)))


def test_a_reward_that_needs_metadata_is_checked_with_prompts_of_its_own(mine, capsys):
    write(mine / "mine.jsonl", [{"darkness": 0.8}, {"darkness": 0.25}, {"darkness": 0.5}])
    assert main(["check-part", "guided:Darkness", "--prompts", "mine.jsonl"]) == 0
    out = capsys.readouterr().out
    assert "FAIL" not in out
    assert "ok    one number per image" in out
    assert re.search(r"^scores .* no noise", out, re.M)


def test_without_them_it_is_refused_once_and_told_of_the_option(mine, capsys):
    assert main(["check-part", "guided:Darkness"]) == 2
    shown = capsys.readouterr()
    assert "Darkness needs a number 'darkness' in the metadata of prompt 'three red circles'. This is a caption" in shown.err
    assert "`diffalign check-part --prompts FILE`" in shown.err
    assert "FAIL" not in shown.out


def test_all_prompts_of_the_file_must_have_what_the_reward_requires(mine, capsys):
    write(mine / "mine.jsonl", [*[{"darkness": 0.5}] * 9, {}])
    assert main(["check-part", "guided:Darkness", "--prompts", "mine.jsonl"]) == 2
    err = capsys.readouterr().err
    assert "in the metadata of prompt 'room 9'" in err
    assert "caption" not in err
    assert main(["check-part", "guided:Darkness", "--prompts", "nowhere.jsonl"]) == 2
    assert "nowhere.jsonl" in capsys.readouterr().err


def test_prompts_are_for_rewards(mine, capsys):
    write(mine / "mine.jsonl", [{"darkness": 0.5}])
    assert main(["check-part", "diffalign.samplers:DeterministicSampler", "--prompts", "mine.jsonl"]) == 2
    assert "DeterministicSampler must be a reward to be given prompts; its kind is: sampler" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["Softmin", "Needy", "softmin", "make", "plain"])
def test_an_aggregation_is_not_taken_for_a_reward(mine, capsys, name):
    assert main(["check-part", f"totals:{name}"]) == 2
    shown = capsys.readouterr()
    assert "it is an aggregation, which has no contract of its own" in shown.err
    assert "properties hold" not in shown.out


def test_a_plan_is_refused_as_it_was(mine, capsys):
    assert main(["check-part", "totals:plan"]) == 2
    assert "FixedPlan must be a policy, a sampler, an objective or a reward, or a function that gives one" in capsys.readouterr().err
