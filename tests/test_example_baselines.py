"""Run files of several tasks and of published baselines: each builds on a tiny pipeline of its family, with the settings that it names."""

import json
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from tiny_pipelines import saved

from diffalign import config
from diffalign.cli import main
from diffalign.policies import FlowMatchingPolicy, LoRA
from diffalign.prompts import read_prompts
from diffalign.rewards.geneval_rules import wanted
from diffalign.rewards.ocr import wanted_text
from diffalign.samplers import RandomWindow, SlidingWindow
from diffalign.vocabulary import NAMES

EXAMPLES = Path(__file__).parents[1] / "examples"
RUNS = {
    "flux1_tmpo_preferences": ("flux-dev", "arXiv:2605.10983", 27),
    "sd35_tmpo_three_tasks": ("sd3", "arXiv:2605.10983", 27),
    "sd35_three_teachers": ("sd3", "arXiv:2605.08063", 2),
    "sd35_flow_grpo_ocr": ("sd3", "arXiv:2505.05470", 24),
    "sd35_flow_grpo_pickscore": ("sd3", "arXiv:2505.05470", 24),
    "flux1_mixgrpo": ("flux-dev", "arXiv:2507.21802", 12),
    "flux1_mixgrpo_random": ("flux-dev", "arXiv:2507.21802", 12),
}
LISTS = {
    "preference": ("a red cube\ntwo cats\n", "txt"),
    "composition": ('{"prompt": "two cats", "tag": "counting", "include": [{"class": "cat", "count": 2}]}\n', "jsonl"),
    "text": ('a sign that says "hi"\n', "txt"),
}


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a red cube\ntwo cats\n")
    for name, (lines, ending) in LISTS.items():
        (tmp_path / f"{name}.{ending}").write_text(lines)
    (tmp_path / "baseline_rewards.py").write_text(
        "def red(images, prompts):\n    return images[:, 0].mean(dim=(1, 2))\n\n"
        "def blue(images, prompts):\n    return images[:, 2].mean(dim=(1, 2))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


def written(run):
    return yaml.safe_load((EXAMPLES / f"{run}.yaml").read_text())


def overrides(run, folder):
    """What takes a run's weights, prompts and rewards to something tiny; its settings stay."""
    content = written(run)
    inner = "policy." * (content["policy"]["class_path"] == "Guided")
    tiny = {"path": folder, "resolution": 32, "max_sequence_length": 24, "dtype": "float32", "device": "cpu"}
    given = [f"--policy.{inner}{name}={value}" for name, value in tiny.items()]
    given += [f"--objective.teachers.{teacher}.{name}={value}" for teacher in teachers(folder, content) for name, value in tiny.items()]
    given += [f"--rewards.{name}=baseline_rewards.{'red' if place % 2 else 'blue'}" for place, name in enumerate(content["rewards"])]
    if content["prompts"].get("class_path") == "Mixture":
        files = {name: f"{name}.{ending}" for name, (_, ending) in LISTS.items()}
        given += [f"--prompts.sources.{name}.prompts.path={file}" for name, file in files.items()]
        return [*given, f"--evaluation.prompts={json.dumps(files)}"]
    return [*given, "--prompts.path=prompts.txt", "--evaluation=null"]


def teachers(folder, content):
    """Names of a run's teachers, whose adapters are where another run would have left them."""
    found = content["objective"]["init_args"].get("teachers", {}) if isinstance(content["objective"], dict) else {}
    for place, teacher in enumerate(found.values()):
        lora = teacher["init_args"]["lora"]
        policy = FlowMatchingPolicy.from_pretrained(folder, lora=LoRA(lora["rank"], lora["alpha"]), device="cpu")
        with torch.no_grad():
            for parameter in policy.trainable_parameters().values():
                parameter.fill_(0.05 * (place + 1))
        policy.save_lora(lora["start"])
    return list(found)


@pytest.mark.parametrize("run", RUNS)
def test_a_run_passes_check_and_says_what_it_needs(run, tmp_path_factory, capsys):
    family, paper, leaves = RUNS[run]
    assert main(["check", str(EXAMPLES / f"{run}.yaml"), *overrides(run, saved(tmp_path_factory, family))]) == 0
    printed = capsys.readouterr().out
    assert str(leaves) in next(line for line in printed.splitlines() if line.startswith("leaves per prompt"))
    text = (EXAMPLES / f"{run}.yaml").read_text()
    header = text[: text.index("\npolicy:")]
    for word in (paper, "eport", "Needs:", "Hardware:", "train examples/" + run):
        assert word in header, word


@pytest.mark.parametrize("run", RUNS)
def test_a_run_needs_no_file_of_prompts_and_its_rewards_understand_those_that_it_has(run):
    tree = written(run)
    if tree["prompts"].get("class_path") == "Mixture":
        sources = tree["prompts"]["init_args"]["sources"]
        lists = {name: (source["prompts"]["init_args"]["path"], source["rewards"]) for name, source in sources.items()}
        held_out = tree["evaluation"]["prompts"]
    else:
        lists, held_out = {"": (tree["prompts"]["path"], tree["rewards"])}, {"": tree["evaluation"]["prompts"]}
    assert held_out == {name: f"{path}-held-out" for name, (path, _) in lists.items()}
    for name, (path, rewards) in lists.items():
        prompts = [*read_prompts(path), *read_prompts(held_out[name])]
        assert len(prompts) > 100
        assert "geneval" not in rewards or all(wanted(prompt, NAMES) for prompt in prompts)
        assert "ocr" not in rewards or all(wanted_text(prompt) for prompt in prompts)


def test_the_two_deviations_and_the_two_windows_arrive(tmp_path_factory):
    def built(run):
        return config.parse(EXAMPLES / f"{run}.yaml", overrides(run, saved(tmp_path_factory, RUNS[run][0]))).build()

    assert built("sd35_flow_grpo_ocr").objective.deviation == "batch"
    assert built("sd35_flow_grpo_pickscore").objective.deviation == "group"
    assert built("flux1_mixgrpo").sampler.plan == SlidingWindow(4, 12, 0.7, 25, 1)
    assert built("flux1_mixgrpo_random").sampler.plan == RandomWindow(4, 12, 0.7)


def test_three_tasks_train_together_and_each_prompt_has_the_rewards_of_its_task(tmp_path_factory, tmp_path):
    run = "sd35_tmpo_three_tasks"
    short = ["--total=1", "--prompts_per_step=3", "--evaluation.samples=2", "--evaluation.steps=2", "--evaluation.every=1"]
    short += ["--sampler.steps=12", "--sampler.plan.late=[2,5,8]", "--sampler.plan.tail_guard=1", "--objective.updates=1"]
    given = [*overrides(run, saved(tmp_path_factory, "sd3")), *short]
    assert main(["train", str(EXAMPLES / f"{run}.yaml"), *given, "--folder", "run"]) == 0
    (line,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    tasks = {"preference": {"pickscore", "hpsv2"}, "composition": {"geneval"}, "text": {"ocr"}}
    found = {(name, task) for task, names in tasks.items() for name in names}
    assert {tuple(name.split("/")[1:]) for name in line if name.startswith("reward/") and name.count("/") == 2} == {
        *found,
        *(("group_std", task) for task in tasks),
    }
    assert all(line[f"source/{task}/share"] == pytest.approx(1 / 3) for task in tasks)
    last = json.loads((tmp_path / "run" / "evaluation.json").read_text())[-1]
    assert {f"{name}/{task}" for name, task in found} <= last["rewards"].keys()


def test_three_teachers_of_other_runs_teach_one_student(tmp_path_factory, tmp_path):
    run = "sd35_three_teachers"
    short = ["--total=1", "--prompts_per_step=3", "--sampler.steps=2", "--evaluation.samples=2", "--evaluation.steps=2"]
    assert main(["train", str(EXAMPLES / f"{run}.yaml"), *overrides(run, saved(tmp_path_factory, "sd3")), *short, "--folder", "run"]) == 0
    (line,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    taught = [line[f"distance/{task}"] for task in LISTS]
    assert 0 < taught[0] < taught[1] < taught[2]  # the adapters of each lie further from the base than those of the one before
    assert line["reward/ocr/text"]


@pytest.mark.parametrize("task", LISTS)
def test_the_head_says_how_to_make_each_teacher(task):
    """A command that goes on in the next line."""
    head = (EXAMPLES / "sd35_three_teachers.yaml").read_text().replace(" \\\n#", "")
    (words,) = [shlex.split(line[1:])[2:] for line in head.splitlines() if f"--folder runs/{task} " in line]
    made = config.parse(words[0], words[1:])
    assert f"folder: runs/{task}" in made.yaml()
    (source,) = [source for name, source in written("sd35_three_teachers")["prompts"]["init_args"]["sources"].items() if name == task]
    assert set(yaml.safe_load(made.yaml())["rewards"]) == set(source["rewards"])
    assert yaml.safe_load(made.yaml())["prompts"]["init_args"]["path"] == source["prompts"]["init_args"]["path"]
