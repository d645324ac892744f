# ruff: noqa: E501  a table with one case a line
"""The command line: what it prints, writes and returns."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from PIL import Image

import diffalign
from diffalign import config
from diffalign.cli import main
from diffalign.config import parts
from diffalign.core import AlignmentLoop, CheckpointError, Hook, Progress, RewardError
from diffalign.costs import forecast

RUN = """
policy: {class_path: GaussianMixturePolicy, init_args: {means: [[-1.0, 0.0], [1.0, 0.0]], scale: 0.3}}
objective: {class_path: SoftmaxTB, init_args: {beta: 2, rows: 20}}
sampler: {class_path: TreeSampler, init_args: {steps: 5, plan: {class_path: FixedPlan, init_args: {splits: [1, 2], branches: 2, eta: 0.5}}}}
rewards: my_parts.red
prompts: {class_path: Prompts, init_args: {prompts: [one, two, three]}}
prompts_per_step: 2
total: 2
"""
PARTS = '''
import os, signal
from diffalign.core import Reward

def red(images, prompts):
    """How red it is."""
    return images[:, 0].mean(dim=(1, 2))

def short(images, prompts):
    return red(images, prompts)[:1]

def interrupt(images, prompts):
    """Ctrl-C, in the midst of a step."""
    os.kill(os.getpid(), signal.SIGINT)
    return red(images, prompts)
'''


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with a run file and a user's own parts beside it."""
    (tmp_path / "toy.yaml").write_text(RUN)
    (tmp_path / "my_parts.py").write_text(PARTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.delitem(sys.modules, "my_parts", raising=False)
    return tmp_path


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, which sees this package wherever it lies."""
    environment = {**os.environ, "PYTHONPATH": str(Path(diffalign.__file__).parents[1])}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, env=environment)


def written(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if "__pycache__" not in path.parts} - {"toy.yaml", "my_parts.py", "__pycache__"}


def metrics(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "/" not in key and key not in ("elapsed", "rows_per_second")} for line in lines]


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from diffalign.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit as end: print(sorted({'torch', 'attrs', 'yaml'} & set(sys.modules)), end.code)"
    for arguments in (["--help"], ["train", "--help"], ["--version"]):
        assert python("-c", code, *arguments).stdout.splitlines()[-1] == "[] 0"


def test_the_module_is_the_command(workplace: Path) -> None:
    result = python("-m", "diffalign", "train", "toy.yaml", "--sampler", "TreSampler")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: sampler must be a TrajectorySampler; got 'TreSampler'. Did you mean TreeSampler? Known: ")
    assert result.stderr.count("\n") == 1
    assert written(workplace) == set()


def test_a_run_imports_only_what_it_uses() -> None:
    code = "import sys; from diffalign.cli import main\nmain(['check', 'toy.yaml']); print(sorted({'diffusers', 'transformers', 'peft'} & set(sys.modules)))"
    assert python("-c", code).stdout.splitlines()[-1] == "[]"


def test_notes_of_optional_packages_do_not_mix_with_the_output() -> None:
    code = "import logging; from diffalign.cli import main; main(['check', 'toy.yaml']); print(logging.getLogger('bitsandbytes.backends.cpu.ops').isEnabledFor(logging.WARNING))"
    assert python("-c", code).stdout.splitlines()[-1] == "False"


# --- train


def test_train_writes_a_run_folder(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "toy.yaml", "--sampler.plan.eta=0.9", "--objective.beta", "3"]) == 0
    folder = workplace / "runs" / "toy"
    assert {"config.yaml", "metrics.jsonl", "environment.json", "step-000002"} <= written(folder)
    assert [line["step"] for line in metrics(folder)] == [0, 1]
    resolved = config.parse(folder)
    assert resolved.tree["sampler"].arguments["plan"].arguments["eta"] == 0.9
    assert (folder / "config.yaml").read_text() == config.parse("toy.yaml", ["--sampler.plan.eta=0.9", "--objective.beta", "3"]).yaml()
    assert "runs/toy" in capsys.readouterr().out


def test_a_used_run_folder_is_refused(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = workplace / "runs" / "toy"
    assert main(["train", "toy.yaml"]) == 0
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    capsys.readouterr()
    assert main(["train", "toy.yaml", "--total", "3"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: folder runs/toy must not hold another run")
    assert "--resume" in message
    assert "--overwrite" in message
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert main(["train", "toy.yaml", "--resume", "--overwrite"]) == 2
    assert main(["train", "toy.yaml", "--folder", "toy.yaml"]) == 2
    assert "folder toy.yaml must be a folder; it is a file" in capsys.readouterr().err


def test_overwrite_removes_the_run_and_nothing_else(workplace: Path) -> None:
    folder = workplace / "runs" / "toy"
    assert main(["train", "toy.yaml", "--checkpoint_every", "1"]) == 0
    (folder / "notes.txt").write_text("mine")
    (folder / "images").mkdir(exist_ok=True)
    (folder / "images" / "step-000000.png").write_text("old")
    left = [folder / name for name in ("watch.jsonl", "alarms.json", "trackers/toy/events", "evaluations/step-000002/evaluation.json")]
    for file in left:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}\n")
    assert main(["train", "toy.yaml", "--overwrite", "--total", "1"]) == 0
    assert not any(file.exists() for file in left)
    assert len(metrics(folder)) == 1
    assert {path.name for path in folder.glob("step-*")} == {"step-000001"}
    assert not (folder / "images" / "step-000000.png").exists()
    assert (folder / "notes.txt").read_text() == "mine"
    assert main(["train", "toy.yaml", "--overwrite", "--sampler.steps", "x"]) == 2
    assert len(metrics(folder)) == 1, "an error of configuration removes nothing"


def test_overwrite_keeps_the_parts_that_the_run_is_made_of(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run folder is trained anew from its own code; nothing else of that code stays."""
    assert main(["train", "toy.yaml"]) == 0
    folder = workplace / "runs" / "toy"
    (workplace / "my_parts.py").unlink()
    (folder / "code" / "package").mkdir()
    for stale in ("stale.py", "package/__init__.py"):
        (folder / "code" / stale).write_text("")
    monkeypatch.delitem(sys.modules, "my_parts")
    assert main(["train", "runs/toy", "--overwrite", "--total", "1"]) == 0
    assert (folder / "code" / "my_parts.py").read_text() == PARTS
    assert {path.name for path in (folder / "code").iterdir()} <= {"my_parts.py", "__pycache__"}
    assert {path.name for path in folder.glob("step-*")} == {"step-000001"}
    assert main(["train", "runs/toy", "--overwrite", "--rewards", "JPEGCompressibility"]) == 0
    assert not (folder / "code").exists()


def test_a_run_that_was_killed_in_its_first_save_is_resumed_at_its_first_step(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "toy.yaml"]) == 0
    folder = workplace / "runs" / "toy"
    before = metrics(folder)
    (folder / "step-000002").rename(folder / "step-000002.tmp")
    (folder / "step-000002.tmp" / "manifest.json").unlink()
    assert main(["train", "toy.yaml", "--resume"]) == 0
    assert "has no checkpoint yet: the run begins at its first step" in capsys.readouterr().err
    assert metrics(folder) == before
    assert {path.name for path in folder.glob("step-*")} == {"step-000002"}


def test_resume_equals_an_uninterrupted_run(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "toy.yaml", "--total", "4", "--folder", "whole"]) == 0
    assert main(["train", "toy.yaml", "--total", "2", "--folder", "parts"]) == 0
    assert main(["train", "parts", "--total", "4", "--resume", "--new-total"]) == 0
    assert metrics(workplace / "whole") == metrics(workplace / "parts")
    capsys.readouterr()
    assert main(["train", "parts", "--total", "4", "--resume", "--new-total"]) == 0
    assert capsys.readouterr().err.startswith("parts has done 4 of 4 steps; nothing is left to do.")


def test_resume_without_a_checkpoint_fails(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "toy.yaml", "--resume"]) == 1
    assert "checkpoint" in capsys.readouterr().err
    assert written(workplace) == set()
    with pytest.raises(CheckpointError):
        main(["train", "toy.yaml", "--resume", "--debug"])


def test_an_interrupt_names_the_checkpoint(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    assert main(["train", "toy.yaml", "--rewards", "my_parts.interrupt"]) == 130
    message = capsys.readouterr().err
    assert "interrupted; the last checkpoint is runs/toy/step-000001." in message
    assert "diffalign train runs/toy --resume" in message
    assert len(metrics(workplace / "runs" / "toy")) == 1
    assert signal.getsignal(signal.SIGINT) is before
    assert main(["train", "toy.yaml", "--resume"]) == 1
    assert "has another configuration: rewards was my_parts.interrupt, is now my_parts.red" in capsys.readouterr().err
    assert main(["train", "toy.yaml", "--resume", "--rewards", "my_parts.interrupt"]) == 130


def test_an_interrupt_before_the_first_step_leaves_nothing(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(self: config.Run, *surroundings: object) -> AlignmentLoop:
        raise KeyboardInterrupt

    monkeypatch.setattr(config.Run, "build", interrupted)
    assert main(["train", "toy.yaml"]) == 130
    assert capsys.readouterr().err == "interrupted before the first step\n"
    assert written(workplace) == set()


def test_an_error_at_run_time_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "toy.yaml", "--rewards", "my_parts.short"]) == 1
    output = capsys.readouterr()
    said = "error: short returned shape (1,) for 8 images; a reward must return one number per image, shape (8,)"
    assert output.err == f"{said}; there is no checkpoint in runs/toy yet\n"
    with pytest.raises(RewardError):
        main(["train", "toy.yaml", "--rewards", "my_parts.short", "--overwrite", "--debug"])


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: AlignmentLoop, total: int, start: int = 0) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr(AlignmentLoop, "advance", broken)
    with pytest.raises(AssertionError, match="a bug"):
        main(["train", "toy.yaml"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sampler.stepz", "3"], "error: sampler.stepz is no parameter of TreeSampler, which takes steps, plan, rows and keep_graph. Did you mean steps?"),
        (["--sampler.steps", "3.7"], "error: sampler.steps must be an integer; got '3.7'"),
        (["--objective.rows", "0"], "error: objective.rows must be >= 1; got 0"),
        (["--sampler.steps=3"], "error: sampler: FixedPlan.splits must lie in [0, 1] for 3 steps"),
        (["--prompts.prompts", "[]"], "error: prompts: Prompts.prompts must hold at least one prompt; got none"),
        (["--rewards", "my_parts.green"], "error: rewards must be a Reward, a function or a mapping (each a Reward or a function); got 'my_parts.green': 'my_parts' has no 'green'"),
        (["--policy.path", "x"], "error: policy.path is no parameter of GaussianMixturePolicy"),
        (["extra"], "error: the command line must override by --key value; got 'extra'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["train", "check"])
def test_errors_of_configuration_write_nothing(
    command: str, arguments: list[str], message: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "toy.yaml", *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(message)
    assert output.err.count("\n") == 1
    assert written(workplace) == set()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (RUN + "total: 3\n", "error: toy.yaml, line 9: key 'total' appears a second time (first in line 8); keep one\n"),
        (RUN + "seed: [1\n", "error: toy.yaml, line 10: expected ',' or ']', but got '<stream end>'\n"),
        (RUN.replace("rewards: my_parts.red\n", ""), "error: rewards is missing: a run needs it (a Reward, a function or a mapping (each a Reward or a function)).\n"),
    ],
)  # fmt: skip
def test_errors_of_the_file(content: str, message: str, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "toy.yaml").write_text(content)
    assert main(["train", "toy.yaml"]) == 2
    assert capsys.readouterr().err == message
    assert written(workplace) == set()


def test_a_run_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "toy.yml"]) == 2
    assert capsys.readouterr().err.startswith("error: RUN 'toy.yml': there is no such file. Did you mean toy.yaml? Built in: ")
    assert main(["check", "shapeworld_tmop"]) == 2
    assert "Did you mean shapeworld_tmpo?" in capsys.readouterr().err


def test_dropped_arguments_are_a_warning_of_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "toy.yaml", "--sampler", "ChainSampler"]) == 0
    said = capsys.readouterr().err
    assert said.startswith(
        "warning: sampler: steps and plan of TreeSampler dropped; ChainSampler is another class and takes its own defaults"
    )
    assert said.count("\n") == 1


# --- check


def test_check_says_what_a_step_costs(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "toy.yaml", "--sampler.rows", "3"]) == 0
    text = capsys.readouterr().out
    lines = {line.partition("  ")[0]: line.partition("  ")[2].strip() for line in text.split("\n\n")[-1].splitlines()}
    # splits at 1 and 2 of 5 steps: frontiers 1, 1, 2, 4, 4 -> 12 rows; 1 + 2 parents, 2 + 4 edges
    assert lines["leaves per prompt"] == "4"
    assert lines["samples per step"] == "8 (2 prompts), 16 in 2 steps"
    assert lines["rollout"] == "12 network rows a prompt, 24 a step in 10 calls"
    assert lines["replay"] == "3 network rows a prompt for 6 stochastic edges, 6 a step, per policy and update"
    assert lines["trains policy"] == "6 of 6 parameters (100.00%) with AdamW"
    assert "eta: 0.5" in text
    assert written(workplace) == set()


def test_the_forecast_is_what_a_step_takes(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(workplace))
    loop = config.parse("toy.yaml").build()
    report = loop.step(loop.prompts.draw(0, 2), Progress(0, 1))
    assert (report.ledger.rows["policy/rollout"], report.ledger.calls["policy/rollout"]) == (24, 5)
    assert len(report.batch.rewards) == 8


def test_the_forecast_knows_what_it_does_not_know(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (workplace / "my_parts.py").open("a") as file:
        file.write(
            textwrap.dedent("""
            from diffalign.core import TrajectorySampler
            from diffalign.samplers import DeterministicSampler

            class Other(TrajectorySampler):
                def sample(self, *arguments):
                    return DeterministicSampler(4, 2).sample(*arguments)
            """)
        )
    policy = "{class_path: diffalign.testing.doubles.TinyPolicy, init_args: {latent_shape: [2]}}"
    assert main(["check", "toy.yaml", "--policy", policy]) == 0
    # 6 rows a step, fewer than the objective's 20
    assert "  activations of 6 rows in the update (counted operator by operator)" in capsys.readouterr().out
    assert main(["check", "toy.yaml", "--sampler", "{class_path: my_parts.Other}"]) == 0
    assert "Other has no branching(), so its samples and rows are not known" in capsys.readouterr().out


def test_optimizer_state_is_measured() -> None:
    weight = torch.nn.Parameter(torch.zeros(100))
    assert forecast._state_bytes(torch.optim.AdamW([weight])) == 2 * 4 * 100
    assert forecast._state_bytes(torch.optim.SGD([weight], lr=1.0)) == 0
    assert forecast._state_bytes(torch.optim.LBFGS([weight])) == 0, "it needs a closure"
    assert forecast._state_bytes(torch.optim.SGD([weight], lr=1.0, momentum=0.9)) == 4 * 100


# --- sample


def test_sample_draws_a_grid(workplace: Path) -> None:
    arguments = ["sample", "toy.yaml", "--prompt", "one", "two", "--n", "3", "--steps", "4"]
    assert main([*arguments, "--out", "a/first.png"]) == 0
    assert main([*arguments, "--out", "second.png"]) == 0
    assert main([*arguments, "--out", "other.png", "--seed", "1"]) == 0
    first, second, other = (Image.open(workplace / name) for name in ("a/first.png", "second.png", "other.png"))
    assert first.width > 3 * 90
    assert first.tobytes() == second.tobytes()
    assert first.tobytes() != other.tobytes()


def test_sample_takes_the_last_checkpoint_of_a_folder(workplace: Path) -> None:
    assert main(["train", "toy.yaml", "--optimizers", "{default: {class_path: SGD, init_args: {lr: 100}}}", "--max_grad_norm", "null"]) == 0
    arguments = ["--prompt", "one", "--steps", "4", "--out"]
    assert main(["sample", "runs/toy", *arguments, "trained.png"]) == 0
    assert main(["sample", "toy.yaml", *arguments, "base.png"]) == 0
    assert Image.open(workplace / "trained.png").tobytes() != Image.open(workplace / "base.png").tobytes()


@pytest.mark.parametrize(("arguments", "code"), [(["--out", "x.docx"], 2), (["--out", "x"], 2)])
def test_sample_refuses_what_is_no_picture(arguments: list[str], code: int, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "toy.yaml", "--prompt", "one", *arguments]) == code
    assert "--out must end in an image format" in capsys.readouterr().err
    assert written(workplace) == set()


@pytest.mark.parametrize(
    "arguments", [[], ["train"], ["fly", "toy.yaml"], ["sample", "toy.yaml", "--prompt", "a", "--out", "a.png", "--n", "0"]]
)
def test_wrong_usage_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("usage: diffalign")


# --- parts


def test_parts_lists_everything_by_slot(workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = workplace / "site" / "theirs-0.3.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 0.3\n")
    (folder / "entry_points.txt").write_text(f"[{parts.GROUP}]\nred = my_parts:red\nblue = my_parts:blue\npi = math:pi\n")
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.syspath_prepend(str(workplace))
    assert main(["parts"]) == 0
    slots = {}
    for block in capsys.readouterr().out.split("\n\n"):
        title, *lines = block.splitlines()
        slots[title.partition(":")[0]] = {line.split()[0]: " ".join(line.split()[1:]) for line in lines}
    assert {"FlowMatchingPolicy.from_pretrained", "GaussianMixturePolicy"} <= slots["Policy"].keys()
    assert {"TreeSampler", "ChainSampler", "DeterministicSampler"} <= slots["TrajectorySampler"].keys()
    assert "FixedPlan" in slots["Plan"]
    assert "SoftmaxTB" in slots["Objective"]
    assert {"Raw", "StandardizedSum"} <= slots["Aggregation"].keys()
    assert {"CPS", "Euler", "FlowSDE"} <= slots["TransitionKernel"].keys()
    assert {"Mixture", "Prompts", "PromptFile"} == slots["PromptSource"].keys()
    assert {"Sequential", "Overlapped"} == slots["Rollout"].keys()
    assert "HeldOutEvaluation" in slots["Hook"]
    assert {"Constant", "Linear", "Cosine"} <= slots["Scalar"].keys()
    assert slots["TrajectorySampler"]["TreeSampler"].startswith("Branches at the steps that a plan gives.")
    assert slots["Reward"]["red"] == "How red it is. (theirs 0.3)"
    assert slots["cannot be loaded"]["blue"].startswith("AttributeError: ")
    assert slots["cannot be loaded"]["blue"].endswith("(theirs 0.3)")
    assert "pi" in slots["fits no slot"]


def test_parts_describes_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parts", "TreeSampler"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("diffalign.samplers.TreeSampler\n")
    assert re.search(r"^  plan +a Plan; default FixedPlan$", text, re.MULTILINE)
    assert main(["parts", "my_parts:red"]) == 0
    assert "  images   anything; required" in capsys.readouterr().out
    assert main(["parts", "TreSampler"]) == 2
    assert capsys.readouterr().err.startswith("error: part 'TreSampler': there is none. Did you mean TreeSampler?")
    assert main(["parts", "TreeSampler", "--steps", "3"]) == 2


def test_hooks_of_the_file_see_the_run(workplace: Path) -> None:
    (workplace / "my_hooks.py").write_text(
        textwrap.dedent("""
        from diffalign.core import Hook

        class Count(Hook):
            steps = 0
            def step(self, loop, report):
                Count.steps += 1
                order = [type(hook).__name__ for hook in loop.hooks]
                assert order == ["Count", "Filling", "FirstAndLast", "Signs", "Recorder", "Checkpoints", "Console"], order
        """)
    )
    assert main(["train", "toy.yaml", "--hooks", "[my_hooks.Count]"]) == 0
    assert sys.modules["my_hooks"].Count.steps == 2
    assert issubclass(sys.modules["my_hooks"].Count, Hook)


def test_a_run_folder_without_a_checkpoint_begins_at_the_first_step(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "toy.yaml", "--folder", "whole"]) == 0
    (workplace / "parts").mkdir()
    assert main(["train", "toy.yaml", "--folder", "parts", "--resume"]) == 0
    assert "parts has no checkpoint yet: the run begins at its first step" in capsys.readouterr().err
    assert metrics(workplace / "whole") == metrics(workplace / "parts")
    shutil.rmtree(workplace / "parts" / "step-000002")
    assert main(["train", "toy.yaml", "--folder", "parts", "--resume", "--seed", "1"]) == 1
    assert "parts has another configuration: seed was 0, is now 1." in capsys.readouterr().err


def test_a_finished_run_whose_end_was_cut_off_is_ended_again(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "toy.yaml"]) == 0
    (workplace / "runs" / "toy" / "report.html").unlink()
    assert main(["train", "toy.yaml", "--resume"]) == 0
    assert (workplace / "runs" / "toy" / "report.html").exists()
    assert len(metrics(workplace / "runs" / "toy")) == 2


def test_check_plans_for_other_devices(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "toy.yaml", "--devices", "3"]) == 0
    assert "3 devices cannot share 2 prompt groups" in capsys.readouterr().out
    assert main(["train", "toy.yaml", "--new-total"]) == 2
    assert "--new-total needs --resume" in capsys.readouterr().err
