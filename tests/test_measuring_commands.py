"""`diffalign evaluate` and `diffalign compare`: what they write, print and refuse."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import diffalign
from diffalign.cli import main

RUN = """
policy: {class_path: GaussianMixturePolicy, init_args: {means: [[-1.0, 0.0], [1.0, 0.0]], scale: 0.3}}
objective: {class_path: SoftmaxTB, init_args: {beta: 2}}
sampler: {class_path: TreeSampler, init_args: {steps: 4, plan: {class_path: FixedPlan, init_args: {splits: [1], branches: 3, eta: 0.5}}}}
rewards: my_parts.red
prompts: {class_path: Prompts, init_args: {prompts: [one, two, three]}}
optimizers: {default: {class_path: AdamW, init_args: {lr: 0.1}}}
prompts_per_step: 2
total: 4
checkpoint_every: 2
checkpoint_keep: 9
evaluation:
  class_path: HeldOutEvaluation
  init_args: {prompts: held-out.txt, every: 2, samples: 3, steps: 4, rewards: {green: my_parts.green}}
"""
PARTS = '''
def red(images, prompts):
    """How red it is."""
    return images[:, 0].mean(dim=(1, 2))

def green(images, prompts):
    return images[:, 1].mean(dim=(1, 2))

class Tagged:
    """Nothing for cats, the number of letters for the others; refuses prompts without classes."""

    def require(self, prompts):
        from diffalign.core import ConfigError
        for prompt in prompts:
            if "include" not in prompt.metadata:
                raise ConfigError(f"Tagged needs the classes of prompt {str(prompt)!r}")

    def __call__(self, images, prompts):
        self.require(prompts)
        return images.new_tensor([float(len(prompt)) for prompt in prompts])

def never(images, prompts):
    """Not one vote yet."""
    from diffalign.core import Partial
    return Partial(images.new_zeros(len(prompts)), images.new_zeros(len(prompts), dtype=bool))

def long(images, prompts):
    return images.new_tensor([float(len(prompt)) for prompt in prompts])
'''


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two runs of four steps, in the folder that they were started in."""
    folder = tmp_path_factory.mktemp("measured")
    (folder / "toy.yaml").write_text(RUN)
    (folder / "odd_names.yaml").write_text(RUN.replace("{green: my_parts.green}", "{red: my_parts.green}"))
    (folder / "my_parts.py").write_text(PARTS)
    (folder / "held-out.txt").write_text("a\nbb\nccc\ndddd\neeeee\n")
    before = Path.cwd()
    os.chdir(folder)
    sys.modules.pop("my_parts", None)
    sys.path.insert(0, str(folder))
    try:
        assert main(["train", "toy.yaml", "--folder", "runs/slow"]) == 0
        assert main(["train", "toy.yaml", "--folder", "runs/fast", "--optimizers.default.lr", "1.0"]) == 0
        yield folder
    finally:
        os.chdir(before)
        sys.path.remove(str(folder))
        sys.modules.pop("my_parts", None)


def evaluation(path):
    return json.loads((Path(path) / "evaluation.json").read_text())


def test_evaluate_repeats_what_the_run_measured_at_its_end(trained, capsys):
    assert main(["evaluate", "runs/slow"]) == 0
    out = capsys.readouterr().out
    assert "slow, step 4: 5 prompts, 3 samples each; mean [95 % interval over prompts]" in out
    found = evaluation("runs/slow/evaluations/step-000004")
    assert found["by_prompt"] == evaluation("runs/slow")[-1]["by_prompt"]
    assert set(found["rewards"]) == {"red", "green"}
    assert (trained / "runs/slow/evaluations/step-000004/images.png").exists()
    assert not (trained / "runs/slow/evaluations/step-000004/rounds").exists()


def test_evaluate_takes_a_checkpoint_and_the_weights_as_they_begin(trained):
    assert main(["evaluate", "runs/slow/step-000002", "--out", "middle"]) == 0
    assert main(["evaluate", "toy.yaml", "--out", "first"]) == 0
    measured = {entry["step"]: entry for entry in evaluation("runs/slow")}
    assert evaluation("middle")["by_prompt"] == measured[2]["by_prompt"]
    assert evaluation("middle")["run"] == "slow/step-000002"
    assert evaluation("first")["by_prompt"] == measured[0]["by_prompt"]
    assert evaluation("first")["step"] == 0


def test_evaluate_with_other_settings_and_further_parts(trained):
    (trained / "two.txt").write_text("x\nyyyy\n")
    arguments = ["--prompts", "two.txt", "--samples", "2", "--steps", "3", "--seed", "9", "--reward", "length=my_parts.long"]
    arguments += ["--features", "tiny={class_path: PixelFeatures, init_args: {side: 1}}", "--features", "PixelFeatures", "--out", "other"]
    assert main(["evaluate", "runs/fast", *arguments]) == 0
    found = evaluation("other")
    assert (found["samples"], found["steps"], found["seed"]) == (2, 3, 9)
    assert [row["rewards"]["length"] for row in found["by_prompt"]] == [1.0, 4.0]
    assert {"vendi/tiny", "vendi/pixel"} <= set(found["diversity"])


def test_two_processes_give_the_same_numbers(trained):
    """Also the real thing: torchrun, gloo, and a folder that both write into."""
    assert main(["evaluate", "runs/fast", "--out", "alone", "--rows", "6"]) == 0
    root = str(Path(diffalign.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, str(trained)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    arguments = ["-m", "diffalign", "evaluate", "runs/fast", "--out", "together", "--rows", "6"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, env=environment, cwd=trained, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("5 prompts, 3 samples each") == 1, "one process speaks"
    alone, together = evaluation("alone"), evaluation("together")
    for mine, other in zip(alone["by_prompt"], together["by_prompt"], strict=True):
        assert mine["prompt"] == other["prompt"]
        for kind in ("rewards", "diversity"):
            assert other[kind] == pytest.approx(mine[kind], abs=1e-6)
    assert together["across"] == pytest.approx(alone["across"], abs=1e-6)


def test_compare_writes_a_page_a_picture_and_numbers(trained, capsys):
    assert main(["compare", "runs/slow", "runs/fast", "runs/fast/step-000002", "toy.yaml", "--out", "compared"]) == 0
    out = capsys.readouterr().out
    assert "fast/step-000002, step 2:" in out
    assert "compared/compare.html" in out
    table = json.loads((trained / "compared/compare.json").read_text())
    assert list(table["runs"]) == ["slow", "fast", "fast/step-000002", "toy"]
    assert table["runs"]["slow"]["by_prompt"] == evaluation("runs/slow")[-1]["by_prompt"]
    equal = {run["run"]: run["step"] for run in table["equal"]["steps"]}
    assert equal == {"slow": 2, "fast": 2, "fast/step-000002": 2}
    assert (trained / "compared/compare.png").exists()


def test_rewards_of_all_runs_are_scored(trained):
    assert main(["train", "toy.yaml", "--folder", "runs/green", "--rewards", "my_parts.green", "--evaluation.rewards", "{}"]) == 0
    assert main(["compare", "runs/green", "runs/slow", "--out", "rewards"]) == 0
    table = json.loads((trained / "rewards/compare.json").read_text())
    assert {name: set(run["rewards"]) for name, run in table["runs"].items()} == {"green": {"green", "red"}, "slow": {"green", "red"}}


def test_compare_where_no_reward_applies_compares_the_diversity(trained, capsys):
    (trained / "never.yaml").write_text(
        (trained / "toy.yaml").read_text().replace("my_parts.red", "my_parts.never").replace(", rewards: {green: my_parts.green}", "")
    )
    shutil.copy(trained / "never.yaml", trained / "nothing.yaml")
    assert main(["compare", "never.yaml", "nothing.yaml", "--out", "unscored"]) == 0
    out = capsys.readouterr().out
    assert "No reward scored a picture: only diversity is compared.\nunscored/compare.html" in out
    assert json.loads((trained / "unscored/compare.json").read_text())["win_rates"] == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "runs/slow"], "compare needs two or more runs with different names; got slow"),
        (["compare", "runs/slow", "runs/slow"], "different names; got slow, slow"),
        (["compare", "runs/slow", "runs/../runs/slow/"], "different names; got slow, slow"),
        (["evaluate", "runs/slow/step-000009"], "there is no such checkpoint. runs/slow has best, step-000002 and step-000004."),
        (["evaluate", "toy.yml"], "RUN 'toy.yml': there is no such file. Did you mean toy.yaml?"),
        (["evaluate", "runs/slwo"], "RUN 'runs/slwo': there is no such file. Did you mean slow?"),
        (["compare", "runs/slow", "runs/fast", "--total", "3"], "compare takes runs and nothing else; got --total 3"),
        (["evaluate", "runs/slow", "--samples", "1"], "--samples must be at least 2"),
        (["evaluate", "runs/slow", "--reward", "nothing.here"], "--reward must be"),
        (["evaluate", "runs/slow", "--reward", "red=my_parts.green"], "--reward must have another name than the run's own rewards; 'red'"),
        (["evaluate", "runs/slow", "--reward", "a=my_parts.red", "--reward", "a=my_parts.long"], "--reward must give each part a name of"),
        (["evaluate", "runs/slow", "--features", "PixelFeatures", "--features", "pixel=PixelFeatures"], "; two are called 'pixel'"),
        (["evaluate", "runs/slow", "--prompts", "absent.txt"], "'absent.txt'"),
        (["evaluate", "toy.yaml", "--evaluation", "null"], "--prompts must name a prompt file"),
        (["evaluate", "toy.yaml", "--evaluation.rewards", "{red: my_parts.green}"], "evaluation.rewards.red must have another name"),
        (["check", "toy.yaml", "--evaluation.rewards", "{red: my_parts.green}"], "evaluation.rewards.red must have another name"),
        (["compare", "runs/slow", "odd_names.yaml"], "evaluation.rewards.red must have another name: the run trains on a reward 'red'"),
    ],
)
def test_errors_are_one_message(arguments, message, trained, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


def test_runs_of_one_name_are_told_apart_by_their_folders(trained):
    for folder in ("one/a", "two/a"):
        shutil.copytree(trained / "runs/slow", trained / folder / "slow")
    few = ["--samples", "2", "--steps", "2", "--out", "alike"]
    runs = ["one/a/slow", "two/a/slow", "one/a/slow/best", "two/a/slow/best", "runs/fast"]
    assert main(["compare", *runs, *few]) == 0
    found = json.loads((trained / "alike/compare.json").read_text())["runs"]
    assert list(found) == ["one/a/slow", "two/a/slow", "one/a/slow/best", "two/a/slow/best", "fast"]
    shutil.copy(trained / "toy.yaml", trained / "slow.yaml")
    assert main(["compare", "slow.yaml", "runs/slow", *few]) == 0
    assert list(json.loads((trained / "alike/compare.json").read_text())["runs"]) == ["slow.yaml", "runs/slow"]


def test_a_folder_without_a_checkpoint_is_refused(trained, capsys):
    (trained / "runs/empty").mkdir(parents=True)
    (trained / "runs/empty/config.yaml").write_text((trained / "runs/slow/config.yaml").read_text())
    assert main(["evaluate", "runs/empty"]) == 1
    assert "must hold a complete checkpoint step-*/ to be evaluated" in capsys.readouterr().err


def test_different_rewards_under_one_name_are_refused(trained, capsys):
    text = (trained / "toy.yaml").read_text().replace("my_parts.green}", "my_parts.long}")
    (trained / "odd.yaml").write_text(text)
    assert main(["compare", "runs/slow", "odd.yaml"]) == 2
    said = capsys.readouterr().err
    assert "the reward 'green' must be the same in all runs; it is my_parts.green in slow and my_parts.long in odd" in said


def test_a_reward_of_the_command_line_does_not_take_the_place_of_that_of_another_run(trained, capsys):
    (trained / "letters.yaml").write_text((trained / "toy.yaml").read_text().replace("my_parts.red", "{letters: my_parts.long}"))
    assert main(["compare", "runs/slow", "letters.yaml", "--reward", "letters=my_parts.green", "--out", "apart"]) == 2
    assert "than the run's own rewards; 'letters' is one" in capsys.readouterr().err


def test_evaluate_says_which_reward_scored_nothing(trained, capsys):
    assert main(["evaluate", "runs/slow", "--reward", "never=my_parts.never", "--out", "unscored-alone"]) == 0
    assert "No prompt was scored by the reward never: it has no number.\n" in capsys.readouterr().out


CATS = """{"tag": "two_object", "include": [{"class": "cat", "count": 1}], "prompt": "a"}
{"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "bbbb"}
{"tag": "counting", "include": [{"class": "cat", "count": 3}], "prompt": "cccccc"}
{"tag": "two_object", "include": [{"class": "dog", "count": 1}], "prompt": "ddd"}
"""


def test_a_suite_has_a_table_by_tag_and_the_mean_of_the_tags(trained, capsys):
    (trained / "cats.jsonl").write_text(CATS)
    arguments = ["--suite", "geneval", "--prompts", "cats.jsonl", "--samples", "2", "--reward", "geneval=my_parts.Tagged"]
    assert main(["evaluate", "runs/slow", *arguments]) == 0
    printed = capsys.readouterr().out
    found = evaluation("runs/slow/evaluations/step-000004-geneval")
    suite = found["suite"]
    assert (suite["name"], suite["prompts"]) == ("geneval", {"two_object": 2, "counting": 2})
    assert {tag: entry["mean"] for tag, entry in suite["tags"]["geneval"].items()} == {"two_object": 2.0, "counting": 5.0}
    assert suite["mean of tags"]["geneval"]["mean"] == 3.5
    assert set(found["rewards"]) == {"geneval"}, "the run's own rewards may not fit the suite's prompts"
    assert "suite geneval, mean [95 % interval over prompts]" in printed
    rows = [line.split() for line in printed.splitlines()]
    assert ["tag", "prompts", "geneval"] in rows
    assert next(row for row in rows if row[:2] == ["counting", "2"])[2] == "5.000"
    assert next(row for row in rows if row[:3] == ["mean", "of", "tags"])[3] == "3.500"


def test_a_suite_brings_its_own_prompts_and_its_reward_refuses_others_before_anything_is_drawn(trained, capsys):
    (trained / "plain.txt").write_text("a cat")
    arguments = ["--suite", "geneval", "--reward", "geneval=my_parts.Tagged", "--samples", "2", "--steps", "1", "--out", "suite"]
    assert main(["evaluate", "toy.yaml", *arguments]) == 0
    assert evaluation("suite")["suite"]["prompts"] == {
        "single_object": 80,
        "two_object": 99,
        "counting": 80,
        "colors": 94,
        "position": 100,
        "color_attr": 100,
    }
    capsys.readouterr()
    assert main(["evaluate", "runs/slow", *arguments, "--prompts", "plain.txt"]) == 2
    assert "Tagged needs the classes of prompt 'a cat'" in capsys.readouterr().err


def test_parts_of_every_suite_are_what_papers_report(trained):
    from diffalign.commands.suites import SUITES
    from diffalign.config.parts import own
    from diffalign.prompts import read_prompts

    for suite in SUITES.values():
        assert {prompt.metadata["tag"] for prompt in read_prompts(suite.prompts)}
        assert all(part.strip("{}").removeprefix("class_path: ").partition(",")[0] in own() for part in suite.rewards.values())
    assert "credit: correct" in SUITES["geneval"].rewards["geneval"], "not the grade that is trained with"
