"""The built-in runs: found by name, alike but for the objective, and a few of their steps raise the reward."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from diffalign import config
from diffalign.cli import main
from diffalign.config import parts
from diffalign.core import Prompt
from diffalign.digits import ClassReward, DigitsPolicy, parse
from diffalign.policies import TDMPolicy
from diffalign.prompts import read_prompts


@pytest.mark.parametrize("name", ["digits_tmpo", "digits_grpo"])
def test_a_few_steps_of_a_built_in_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = ["--total", "12", "--prompts_per_step", "4", "--optimizers.default.lr", "1e-3", "--average", "null"]
    assert main(["train", name, "--folder", "run", "--policy.device", "cpu", "--evaluation.samples", "24", *short]) == 0
    before, after = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert (before["step"], after["step"]) == (0, 12)
    assert after["rewards"]["ClassReward"] > before["rewards"]["ClassReward"] + 0.05


def test_a_student_is_distilled_and_then_reinforced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = ["--total", "2", "--prompts_per_step", "2", "--policy.policy.device", "cpu", "--evaluation.samples", "8"]
    assert main(["train", "digits_tdm", "--sampler.samples", "2", *short]) == 0
    base = DigitsPolicy.from_pretrained("digits", device="cpu")
    first = TDMPolicy.from_saved(base.fork(), "runs/digits_tdm/student")
    students = [(base, first)]
    for name in ("digits_tdm_r1", "digits_tdm_direct"):
        assert main(["train", name, "--sampler.samples", "8", "--objective.plan.warmup", "0", *short]) == 0
        students.append((first, TDMPolicy.from_saved(base.fork(), f"runs/{name}/student")))
        assert [entry["step"] for entry in json.loads((tmp_path / "runs" / name / "evaluation.json").read_text())] == [0, 2]
    for one, other in students:
        assert any(not torch.equal(old, new) for old, new in zip(one.parameters(), other.parameters(), strict=True))


def test_three_teachers_are_made_as_the_run_file_says_and_become_one_student(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = ["--total", "1", "--policy.device", "cpu", "--evaluation.samples", "2", "--evaluation.steps", "2"]
    head = [line.split() for line in config.locate("digits_three_teachers").read_text().splitlines() if line.startswith("#   diffalign")]
    made = [words[2:] for words in head if "digits_tmpo" in words]
    for words in made:
        assert main([*words, "--prompts_per_step", "2", *short]) == 0
        assert main(["export", words[words.index("--folder") + 1], "--format", "merged"]) == 0
    assert main(["check", "digits_three_teachers", "--policy.device", "cpu"]) == 0
    assert main(["train", "digits_three_teachers", "--prompts_per_step", "3", *short]) == 0
    (step,) = map(json.loads, (tmp_path / "runs/digits_three_teachers/metrics.jsonl").read_text().splitlines())
    weights = [DigitsPolicy.from_pretrained("digits", device="cpu").own_parameters()]
    for task in ("even", "thick", "asked"):
        assert step[f"distance/{task}"] > 0
        weights.append(DigitsPolicy.from_pretrained(f"runs/{task}/export/merged", device="cpu").own_parameters())
        taught = load_file(tmp_path / f"runs/digits_three_teachers/step-000001/teacher_{task}.safetensors")
        assert all(torch.equal(value, taught[name]) for name, value in weights[-1].items())
    for place, one in enumerate(weights):  # none taught by the base, or by another's teacher
        assert all(any(not torch.equal(one[name], other[name]) for name in one) for other in weights[:place])
    last = json.loads((tmp_path / "runs/digits_three_teachers/evaluation.json").read_text())[-1]
    assert {f"{task}/{task}" for task in ("even", "thick", "asked")} <= last["rewards"].keys()


def test_its_weights_are_exported_and_read_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    short = ["--total", "1", "--prompts_per_step", "2", "--average", "null", "--evaluation", "null", "--policy.device", "cpu"]
    assert main(["train", "digits_tmpo", "--folder", "run", *short]) == 0
    assert main(["export", "run", "--format", "diffusers"]) == 2
    assert "DigitsPolicy is no diffusers pipeline and has no LoRA; export it with --format merged" in capsys.readouterr().err
    assert main(["export", "run"]) == 0
    again = DigitsPolicy.from_pretrained("run/export/merged", device="cpu")
    base = DigitsPolicy.from_pretrained("digits", device="cpu")
    steps = load_file(tmp_path / "run/step-000001/policy.safetensors")
    assert all(torch.equal(value, steps[name]) for name, value in again.own_parameters().items())
    assert not all(torch.equal(value, base.own_parameters()[name]) for name, value in again.own_parameters().items())
    card = (tmp_path / "run/export/merged/README.md").read_text()
    assert "SoftmaxTB" in card
    assert "from diffalign.digits import DigitsPolicy" in card
    assert 'policy = DigitsPolicy.from_pretrained(".")' in card


def test_the_two_runs_differ_in_the_objective_alone():
    tmpo, grpo = (yaml.safe_load(config.locate(name).read_text()) for name in ("digits_tmpo", "digits_grpo"))
    assert (tmpo["objective"]["class_path"], grpo["objective"]["class_path"]) == ("SoftmaxTB", "FlowGRPO")
    del tmpo["objective"], grpo["objective"]
    assert tmpo == grpo


def test_a_bonus_is_written_by_digit():
    reward = ["--rewards.bonus", "{0: 0.2, 3: -0.1}"]
    loop = config.parse("digits_tmpo", ["--policy.device", "cpu", "--evaluation", "null", *reward]).build()
    assert loop.rewards == ClassReward(bonus={0: 0.2, 3: -0.1})


def test_lists_are_found_by_name():
    assert read_prompts("digits/any") == [Prompt("a thick digit"), Prompt("a digit")]
    assert len(read_prompts("digits/all")) + len(read_prompts("digits/all-held-out")) == 45
    assert all(parse(prompt).family == "name" for prompt in read_prompts("digits/name-held-out"))


def test_short_names_lead_to_the_parts():
    assert parts.find("ClassReward") is ClassReward
    assert parts.find("DigitsPolicy.from_pretrained") == DigitsPolicy.from_pretrained
    assert {"DigitReward", "ThicknessReward", "LikesReward", "DigitsPolicy"} <= parts.own().keys()
