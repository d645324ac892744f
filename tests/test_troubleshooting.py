"""The commands of docs/troubleshooting.md on a small run: each says what the page promises."""

import json
import re
from pathlib import Path

import pytest

from diffalign import config
from diffalign.cli import main
from diffalign.threads import BESIDE_ACCELERATOR, VARIABLES

PAGE = (Path(__file__).parents[1] / "docs" / "troubleshooting.md").read_text()
RUN = """
policy: {class_path: GaussianMixturePolicy, init_args: {means: [[-1.0, 0.0], [1.0, 0.0]], scale: 0.3}}
objective: {class_path: SoftmaxTB, init_args: {beta: 2}}
sampler: {class_path: TreeSampler, init_args: {steps: 4, plan: {class_path: FixedPlan, init_args: {splits: [1, 2], branches: 2, eta: 0.5}}}}
rewards: trouble_rewards.red
prompts: {class_path: Prompts, init_args: {prompts: [one, two]}}
prompts_per_step: 1
total: 2
"""


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    (tmp_path / "toy.yaml").write_text(RUN)
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    (tmp_path / "trouble_rewards.py").write_text("def red(images, prompts):\n    return images.flatten(1).mean(dim=1)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_the_contract_replays_every_stochastic_edge(workplace):
    assert "diffalign train RUN --total 1 --folder runs/contract" in PAGE
    assert main(["train", "toy.yaml", "--total", "1", "--folder", "runs/contract"]) == 0
    (line,) = map(json.loads, (workplace / "runs/contract/metrics.jsonl").read_text().splitlines())
    assert line["contract/deviation"] == 0.0
    assert line["rows/policy/contract"] == (1 + 2) + 2  # the parents of both levels, and the first of them twice


def test_trained_weights_stand_beside_those_of_the_run_file(workplace, capsys):
    assert main(["train", "toy.yaml"]) == 0
    assert main(["evaluate", "runs/toy", "--prompts", "prompts.txt"]) == 0
    assert "diffalign compare RUN.yaml runs/NAME/best" in PAGE
    assert main(["compare", "toy.yaml", "runs/toy/best", "--prompts", "prompts.txt"]) == 0
    printed = capsys.readouterr().out
    assert "red" in printed
    assert "l_gmd" in printed or "L-GMD" in printed


def test_the_page_names_what_decides_about_threads():
    section = PAGE.partition("## Everything is slow when several runs share a machine")[2]
    assert BESIDE_ACCELERATOR == 4
    assert "| the policy is on an accelerator | 4, " in section
    assert all(name in section for name in (*VARIABLES, "LOCAL_WORLD_SIZE", "`threads`"))


def test_resume_says_what_the_page_quotes(workplace, capsys):
    assert main(["train", "toy.yaml", "--checkpoint_every", "1"]) == 0
    assert main(["train", "toy.yaml", "--resume", "--objective.beta", "3"]) == 1
    assert "has another configuration: " in capsys.readouterr().err
    assert main(["train", "toy.yaml"]) == 2
    assert "must not hold another run" in capsys.readouterr().err
    for quoted in ("has another configuration: ", "must not hold another run", "must hold a checkpoint step-*/ to resume from"):
        assert quoted in PAGE


def test_a_budget_is_given_for_a_device(workplace, capsys):
    assert main(["check", "shapeworld_tmpo", "--memory", "24", "--teraflops", "1"]) == 0
    assert "24 GiB" in capsys.readouterr().out
    assert main(["check-part", "trouble_rewards:red"]) == 0
    assert "properties hold" in capsys.readouterr().out


def test_options_of_the_page_fit_a_run():
    options = re.findall(r"`(--[a-z_.]+) ([^`]+)`", PAGE)
    assert len(options) > 8
    for option, value in options:
        if option not in ("--features",):
            config.parse("shapeworld_tmpo", [option, value])


def test_metrics_of_the_page_are_written(workplace):
    assert main(["train", "toy.yaml"]) == 0
    line = json.loads((workplace / "runs/toy/metrics.jsonl").read_text().splitlines()[0])
    named = set(re.findall(r"`((?:reward|ess|ratio|log_ratio|grad_norm|contract|diversity)/\w+|skipped_groups|rows_per_second)`", PAGE))
    assert len(named) > 7
    assert not named - set(line)
