"""A run folder is whole: it can be looked at and gone on with from anywhere, without what lay around it when it began."""

import importlib
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from diffalign import config
from diffalign.cli import main
from diffalign.config.sources import CODE, sources
from diffalign.core import ConfigError
from diffalign.runs.identity import differences

RUN = """
policy: {class_path: own_parts.Mine.from_pretrained, init_args: {device: cpu}}
objective: SoftmaxTB
sampler: {class_path: TreeSampler, init_args: {steps: 3, plan: {splits: [1], branches: 3}}}
rewards: {even: own_parts.even}
prompts: {path: texts/mine.txt}
prompts_per_step: 2
total: 1
"""
PARTS = '''
from diffalign.digits import DigitsPolicy

print("own_parts is imported")

class Mine(DigitsPolicy):
    """A policy of one's own."""

def even(images, prompts):
    from own_package.inner import number
    return images.mean(dim=(1, 2, 3)) * number()
'''
PACKAGE = {
    "__init__.py": "",
    "inner.py": "from . import constants\nfrom .constants import TWO\n\ndef number():\n    return TWO\n",
    "constants.py": "import math\nimport torch\n\nTWO = 2\n",
    "unused.py": "",
}
NAMES = ("own_parts", "own_package", "own_package.inner", "own_package.constants")


def forget_modules(monkeypatch: pytest.MonkeyPatch, path: list[str]) -> None:
    """As a process that begins."""
    monkeypatch.setattr(sys, "path", list(path))
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.fixture
def began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    path = [entry for entry in sys.path if entry]
    work = tmp_path / "work"
    (work / "texts").mkdir(parents=True)
    (work / "own_package").mkdir()
    (work / "mine.yaml").write_text(RUN)
    (work / "own_parts.py").write_text(PARTS)
    (work / "texts" / "mine.txt").write_text("an even digit\na thin seven\n")
    for name, text in PACKAGE.items():
        (work / "own_package" / name).write_text(text)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    forget_modules(monkeypatch, path)
    return path


def test_a_run_is_sampled_exported_evaluated_and_resumed_after_a_move(
    tmp_path: Path, began: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(tmp_path / "work" / "mine.yaml")]) == 0  # from another folder than that of the run file
    run = tmp_path / "elsewhere" / "runs" / "mine"
    kept = {file.relative_to(run / CODE).as_posix() for file in (run / CODE).rglob("*.py")}
    assert kept == {"own_parts.py", "own_package/__init__.py", "own_package/inner.py", "own_package/constants.py"}
    moved = tmp_path / "moved"
    run.rename(moved)
    shutil.rmtree(tmp_path / "work" / "own_package")
    (tmp_path / "work" / "own_parts.py").unlink()
    (tmp_path / "third").mkdir()
    monkeypatch.chdir(tmp_path / "third")
    for command in (
        ["sample", str(moved), "--prompt", "a seven", "--n", "1", "--steps", "2", "--out", "seven.png"],
        ["export", str(moved), "--format", "merged"],
        ["export", str(moved / "step-000001"), "--format", "merged", "--out", "exported"],
        ["evaluate", str(moved), "--prompts", str(tmp_path / "work" / "texts" / "mine.txt"), "--samples", "2", "--steps", "2"],
        ["train", str(moved), "--resume", "--total", "2", "--new-total"],
    ):
        forget_modules(monkeypatch, began)
        assert main(command) == 0, capsys.readouterr().err
    assert Image.open("seven.png").size[0] > 0
    assert (moved / "step-000002").exists()
    assert "Mine" in (moved / "export" / "merged" / "README.md").read_text()


LOUD = """
class Loud:
    def __init__(self):
        print("built")

    def __call__(self, images, prompts):
        return images.mean(dim=(1, 2, 3))
"""


def test_sample_and_export_build_no_reward(
    tmp_path: Path, began: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "work" / "own_parts.py").write_text(PARTS + LOUD)
    run = ["--rewards", "own_parts.Loud"]
    assert main(["train", str(tmp_path / "work" / "mine.yaml"), *run]) == 0
    assert "built" in capsys.readouterr().out
    assert main(["sample", "runs/mine", "--prompt", "a seven", "--n", "1", "--steps", "2", "--out", "seven.png"]) == 0
    assert (
        main(["sample", str(tmp_path / "work" / "mine.yaml"), *run, "--prompt", "a seven", "--n", "1", "--steps", "2", "--out", "base.png"])
        == 0
    )
    assert main(["export", "runs/mine", "--format", "merged"]) == 0
    assert "built" not in capsys.readouterr().out


def test_a_prompt_that_cannot_be_read_is_one_line(tmp_path: Path, began: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run = str(tmp_path / "work" / "mine.yaml")
    assert main(["sample", run, "--prompt", "a cat", "--out", "cat.png"]) == 2
    assert capsys.readouterr().err.startswith("error: --prompt: 'a cat' is no prompt of digits")


def test_a_module_of_the_same_name_that_differs_is_an_error(tmp_path: Path, began: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(tmp_path / "work" / "mine.yaml")]) == 0
    (tmp_path / "work" / "own_parts.py").write_text(PARTS + "\n# another\n")
    with pytest.raises(ConfigError, match=r"code/own_parts\.py must be the module 'own_parts' of this run"):
        config.parse("runs/mine")


def test_two_runs_of_one_package_are_compared(
    tmp_path: Path, began: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each keeps the modules that it imports, of a package that is loaded only once."""
    work = tmp_path / "work"
    for name in ("one", "two"):
        (work / "own_package" / f"{name}.py").write_text(
            f"from diffalign.objectives import SoftmaxTB\n\nclass {name.title()}(SoftmaxTB):\n    pass\n"
        )
        (work / f"{name}.yaml").write_text(RUN.replace("objective: SoftmaxTB", f"objective: own_package.{name}.{name.title()}"))
        forget_modules(monkeypatch, began)
        monkeypatch.delitem(sys.modules, f"own_package.{name}", raising=False)
        assert main(["train", str(work / f"{name}.yaml")]) == 0
        assert not (Path("runs") / "one" / CODE / "own_package" / "two.py").exists()
    shutil.rmtree(work / "own_package")  # what the runs keep is all that there is
    forget_modules(monkeypatch, began)
    for name in ("one", "two"):
        monkeypatch.delitem(sys.modules, f"own_package.{name}")
    (work / "held.txt").write_text("a seven\n")
    capsys.readouterr()
    assert main(["compare", "runs/one", "runs/two", "--prompts", str(work / "held.txt"), "--samples", "2", "--steps", "2"]) == 0
    assert "one -> two, the same prompts and noise" in capsys.readouterr().out


def test_a_module_that_is_not_loaded_yet_and_differs_is_an_error_too(
    tmp_path: Path, began: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its package is loaded from another run, which has a file of that name; it would be imported from there."""
    for name in ("one", "two"):
        assert main(["train", str(tmp_path / "work" / "mine.yaml"), "--folder", f"runs/{name}"]) == 0
    forget_modules(monkeypatch, began)
    shutil.rmtree(tmp_path / "work" / "own_package")
    config.parse("runs/one")
    importlib.import_module("own_package")
    assert "own_package.inner" not in sys.modules
    changed = Path("runs/two") / CODE / "own_package" / "inner.py"
    changed.write_text(changed.read_text() + "\n# another\n")
    with pytest.raises(
        ConfigError, match=r"two/code/own_package/inner\.py must be the module 'own_package\.inner' of this run; .*runs/one"
    ):
        config.parse("runs/two")


def test_a_source_that_changes_between_start_and_resume_is_named(
    tmp_path: Path, began: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "work" / "mine.yaml")
    assert main(["train", run]) == 0
    (tmp_path / "work" / "own_package" / "constants.py").write_text("TWO = 3\n")
    forget_modules(monkeypatch, began)
    capsys.readouterr()
    assert main(["train", run, "--resume", "--total", "2", "--new-total"]) == 0
    assert "own_package/constants.py changed since the run began" in capsys.readouterr().err
    assert (tmp_path / "elsewhere" / "runs" / "mine" / CODE / "own_package" / "constants.py").read_text() == "TWO = 3\n"


def test_own_files_that_a_run_folder_leaves_aside_are_named(
    tmp_path: Path, began: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    monkeypatch.chdir(work)
    assert main(["train", "mine.yaml"]) == 0
    more = ["--resume", "--total", "2", "--new-total"]
    forget_modules(monkeypatch, began)
    capsys.readouterr()
    assert main(["train", "runs/mine", *more]) == 0
    assert "own parts" not in capsys.readouterr().err  # nothing differs
    (work / "own_package" / "constants.py").write_text("TWO = 3\n")
    forget_modules(monkeypatch, began)
    assert main(["evaluate", "runs/mine", "--prompts", "texts/mine.txt", "--samples", "2", "--steps", "2"]) == 0
    line = "warning: own parts come from runs/mine/code; ./own_package/constants.py differs and is not used"
    assert capsys.readouterr().err.splitlines().count(line) == 1
    assert (work / "runs" / "mine" / CODE / "own_package" / "constants.py").read_text() == PACKAGE["constants.py"]


def test_libraries_and_this_package_are_no_sources() -> None:
    assert sources(["torch", "json", "diffalign.core", "attrs", "__main__"]) == {}


BROKEN = """
calls = 0

def late(images, prompts):
    raise RuntimeError("not today")
"""


def test_a_run_that_failed_before_its_first_update_does_not_block_its_folder(
    tmp_path: Path, began: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "work" / "own_parts.py").write_text(PARTS + BROKEN)
    run = str(tmp_path / "work" / "mine.yaml")
    assert main(["train", run, "--rewards", "own_parts.late"]) == 1
    assert (tmp_path / "elsewhere" / "runs" / "mine" / "metrics.jsonl").exists()
    assert main(["train", run]) == 0
    assert main(["train", run]) == 2
    assert "must not hold another run" in capsys.readouterr().err


FAMILY = '''
from diffalign.policies.diffusers.sd3 import StableDiffusion3

class Brighter(StableDiffusion3):
    """A family of one's own, for a pipeline class that another serves, too."""

    pipelines = ()

    def decode(self, latents):
        return (super().decode(latents) + 0.25).clamp(0, 1)
'''


def test_a_family_of_ones_own_is_named_in_a_run_file_and_survives_export(
    tmp_path: Path, began: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    (work / "own_parts.py").write_text(FAMILY)
    (work / "toy.yaml").write_text(
        "policy: {class_path: FlowMatchingPolicy.from_pretrained, init_args: {path: shapeworld, family: own_parts.Brighter, device: cpu, "
        "lora: {rank: 1}, max_sequence_length: 16}}\nobjective: SoftmaxTB\n"
        "sampler: {class_path: TreeSampler, init_args: {steps: 2, plan: {splits: [0], branches: 2}}}\nrewards: CountReward\n"
        "prompts: {path: shapeworld/count}\nprompts_per_step: 1\ntotal: 1\n"
    )
    assert main(["train", str(work / "toy.yaml")]) == 0
    shutil.rmtree(work)
    forget_modules(monkeypatch, began)
    run = tmp_path / "elsewhere" / "runs" / "toy"
    assert main(["sample", str(run), "--prompt", "three red circles", "--n", "1", "--steps", "2", "--out", "red.png"]) == 0
    assert main(["export", str(run)]) == 0
    policy = config.parse(run).build().objective.policy
    assert type(policy.family).__name__ == "Brighter"
    assert (run / "export" / "diffusers" / "README.md").exists()


@pytest.mark.parametrize("name", ["no_such.Family", "diffalign.core.Policy", "Brighter"])
def test_what_is_no_family_is_refused(name: str) -> None:
    from diffalign.policies.diffusers.loading import _named

    with pytest.raises(ValueError, match="family must be the import path of a"):
        _named(name)


def test_a_few_step_student_is_sampled_in_its_own_steps(tmp_path: Path, began: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    student = "{class_path: TDMPolicy, init_args: {steps: 3, policy: {class_path: DigitsPolicy.from_pretrained, init_args: {device: cpu}}}}"
    run = tmp_path / "work" / "student.yaml"
    run.write_text(RUN.replace("{class_path: own_parts.Mine.from_pretrained, init_args: {device: cpu}}", student))
    drawn = ["sample", str(run), "--prompt", "a seven", "--n", "1", "--out"]
    assert main([*drawn, "own.png"]) == 0
    assert main([*drawn, "three.png", "--steps", "3"]) == 0
    assert Path("own.png").read_bytes() == Path("three.png").read_bytes()
    assert main([*drawn, "four.png", "--steps", "4"]) == 1


def test_a_file_that_a_run_makes_is_the_same_path_when_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before, after = ("policy: {path: made/by.it, text: a}", f"policy: {{path: {tmp_path}/made/by.it, text: a}}")
    assert differences(before, after) == []
    assert [path for path, *_ in differences(before, after.replace("by.it", "other"))] == ["policy.path"]
    assert differences("policy: {path: by.it}", f"policy: {{path: {tmp_path}/by.it}}") == []
    assert differences("policy: {path: by.it}", "policy: {path: it.by}") == [("policy.path", "by.it", "it.by")]


def test_a_long_text_is_no_path(tmp_path: Path) -> None:
    text = RUN.replace("[an even digit]", "[x]").replace("{path: texts/mine.txt}", "{class_path: Prompts, init_args: {prompts: [one]}}")
    negative = "blurry/dark. " * 60
    policy = "{class_path: Guided, init_args: {scale: 2.0, negative: 'TEXT', policy: {class_path: DigitsPolicy.from_pretrained}}}"
    policy = policy.replace("TEXT", negative)
    text = text.replace("{class_path: own_parts.Mine.from_pretrained, init_args: {device: cpu}}", policy).replace(
        "{even: own_parts.even}", "ClassReward"
    )
    assert config.parse_text(text).tree["policy"].arguments["negative"] == negative


def test_a_folder_without_a_slash_in_its_name_is_kept_as_a_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "shapeworld"):
        (tmp_path / name).mkdir()
    text = (
        "policy: {class_path: FlowMatchingPolicy.from_pretrained, init_args: {path: NAME}}\nobjective: SoftmaxTB\nsampler: TreeSampler\n"
        "rewards: JPEGCompressibility\nprompts: {path: shapeworld/count}\n"
    )
    for name, expected in (("base", str(tmp_path / "base")), ("shapeworld", "shapeworld"), ("absent", "absent")):
        assert config.parse_text(text.replace("NAME", name), "run").tree["policy"].arguments["path"] == expected
