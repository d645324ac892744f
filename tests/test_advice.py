"""What a message advises can be done, as it is written."""

import json
import os
import re
import shlex
import signal
import sys
from pathlib import Path

import pytest
import torch
from ring import ring_loop
from toy import TOY

from diffalign.cli import _refuse_other_commands, main
from diffalign.core import CheckpointError, ConfigError
from diffalign.prompts.files import read_prompts
from diffalign.runs.snapshot import save
from diffalign.testing import channel_reward

PARTS = """
def dark(images, prompts):
    return 1 - images.mean(dim=(1, 2, 3))
"""


def stopped(images, prompts):
    """Somebody presses Ctrl-C in the midst of a step, while the file `stop` is there."""
    if Path("stop").exists():
        Path("stop").unlink()
        os.kill(os.getpid(), signal.SIGINT)
    return channel_reward(images, prompts)


def broken(images, prompts):
    if Path("stop").exists():
        Path("stop").unlink()
        raise ConnectionError("503")
    return channel_reward(images, prompts)


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    (tmp_path / "toy.yaml").write_text(TOY)
    (tmp_path / "advice_parts.py").write_text(PARTS)
    (tmp_path / "some.jsonl").write_text('"one"\n')
    (tmp_path / "advice_package").mkdir()
    for name in ("__init__", "inner"):
        (tmp_path / f"advice_package/{name}.py").touch()
    monkeypatch.delitem(sys.modules, "advice_package", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)


def said(capsys, *words):
    assert main([*words]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(("reward", "code"), [("stopped", 130), ("broken", 1)])
def test_the_command_that_continues_a_run_continues_that_run(capsys, reward, code):
    keys = ["--folder", "runs/my run", "--total", "3", "--checkpoint_every", "1", "--rewards", f"test_advice.{reward}"]
    assert main(["train", "toy.yaml", "--total", "1", *keys[:2], *keys[4:]]) == 0
    Path("stop").touch()
    assert main(["train", "toy.yaml", *keys, "--fixed-rows", "--resume", "--new-total"]) == code
    command = re.search(r"Continue by: diffalign (.*)\n", capsys.readouterr().err)[1]
    assert "--fixed-rows" in command
    assert main(shlex.split(command)) == 0
    lines = Path("runs/my run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]
    assert [path.name for path in Path("runs").iterdir()] == ["my run"]


def test_an_interrupted_run_is_named_by_its_folder_alone(capsys):
    Path("stop").touch()
    assert main(["train", "toy.yaml", "--folder", "runs/other", "--rewards", "test_advice.stopped"]) == 130
    assert capsys.readouterr().err.endswith(". Continue by: diffalign train runs/other --resume\n")


@pytest.mark.parametrize("emptied", [False, True], ids=["as now", "with the empty file of older ones"])
def test_a_checkpoint_of_a_program_says_what_its_run_says(capsys, emptied):
    ring_loop().run(1, folder="runs/mine")
    checkpoint = Path("runs/mine/step-000001")
    assert not (checkpoint / "config.yaml").exists()
    if emptied:
        (checkpoint / "config.yaml").touch()
    of_run = said(capsys, "evaluate", "runs/mine")
    for command in (["evaluate"], ["export"], ["sample", "--prompt", "x", "--out", "x.png"]):
        text = said(capsys, command[0], "runs/mine/step-000001", *command[1:])
        assert "a Python program has made the run" in text
        assert 'load_weights(policy, "runs/mine/step-000001/policy.safetensors")' in text
        assert text.partition("In Python")[2] == of_run.partition("In Python")[2]


def test_a_checkpoint_that_lost_its_configuration_takes_that_of_its_run(capsys):
    assert main(["train", "toy.yaml", "--total", "1", "--folder", "kept"]) == 0
    Path("kept/step-000001/config.yaml").unlink()
    manifest = json.loads(Path("kept/step-000001/manifest.json").read_text())
    manifest["files"].pop("config.yaml")
    Path("kept/step-000001/manifest.json").write_text(json.dumps(manifest))
    assert main(["evaluate", "kept/step-000001", "--prompts", "some.jsonl", "--steps", "2"]) == 0


def test_a_student_that_is_not_there_yet_is_made_by_the_run_of_its_folder(capsys):
    text = said(capsys, "check", "digits_tdm_r1")
    assert "runs/digits_tdm/student must hold a student" in text
    assert text.endswith(". Run `diffalign train digits_tdm` first.\n")
    for other in ("elsewhere/student", "runs/digits_tdm/mine", "runs/digits_tdm/export/merged", "runs/mine/student"):
        assert "Run `diffalign" not in said(capsys, "check", "digits_tdm_r1", "--policy.path", other)
    Path("runs/digits_tdm/student").mkdir(parents=True)
    assert "Run `diffalign" not in said(capsys, "check", "digits_tdm_r1"), "it was made, and is damaged"


@pytest.mark.parametrize(("words", "text"), [
    ("check toy.yaml --resume", "--resume is an option of diffalign train; diffalign check does not have it"),
    ("check toy.yaml --resume --total 3", "--resume is an option of diffalign train; diffalign check does not have it"),
    ("train toy.yaml --try", "--try is an option of diffalign check; diffalign train does not have it"),
    ("train toy.yaml --prompt", "--prompt is an option of diffalign sample; diffalign train does not have it"),
    ("train toy.yaml --seed", "error: --seed must be followed by a value; got nothing\n"),
    ("train toy.yaml --prompts --total 3", "error: --prompts must be followed by a value; got --total\n"),
    ("check toy.yaml --sampler", "--sampler must be followed by a value; got nothing"),
    ("check toy.yaml --rewards advice_part.dark", "there is no module 'advice_part'. Did you mean advice_parts?\n"),
    ("check toy.yaml --rewards advice_part:dark", "there is no module 'advice_part'. Did you mean advice_parts?\n"),
    ("check toy.yaml --rewards nowhere.dark", "there is no module 'nowhere'\n"),
    ("check toy.yaml --rewards advice_package.iner.dark", "'advice_package' has no 'iner'. Did you mean inner?\n"),
    ("check toy.yaml --rewards advice_package.iner:dark", "there is no module 'advice_package.iner'. Did you mean inner?\n"),
    ("check toy.yaml --rewards advice_package.other:dark", "there is no module 'advice_package.other'\n"),
])  # fmt: skip
def test_what_was_meant_is_named(capsys, words, text):
    assert text in said(capsys, *words.split())


def test_overrides_with_values_build_no_parsers(monkeypatch):
    monkeypatch.setattr("diffalign.cli._options_of", lambda command: pytest.fail(f"the parser of {command} was built"))
    _refuse_other_commands("train", ["--total", "3", "--objective.beta=2", "--sampler.steps", "4"])


def test_a_module_beside_the_run_file_is_proposed(capsys):
    Path("deep").mkdir()
    Path("deep/toy.yaml").write_text(TOY)
    Path("deep/lonely_parts.py").write_text(PARTS)
    assert "Did you mean lonely_parts?" in said(capsys, "check", "deep/toy.yaml", "--rewards", "lonely_part.dark")


def test_a_command_that_there_is_not_is_refused_with_the_one_that_was_meant(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["trian", "toy.yaml"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith("there is no command 'trian'. Did you mean train?\n")
    with pytest.raises(SystemExit):
        main(["xyz"])
    assert "invalid choice: 'xyz' (choose from " in capsys.readouterr().err


def test_a_prompt_file_beside_the_missing_one_is_proposed_and_lists_are_named_once(capsys):
    held_out = ["--evaluation", "HeldOutEvaluation", "--evaluation.prompts"]
    text = said(capsys, "check", "toy.yaml", "--prompts", "PromptFile", "--prompts.path", "some.json", *held_out, "some.json")
    assert text.count("Did you mean some.jsonl?") == 2
    assert "Shipped lists" not in text
    text = said(capsys, "check", "toy.yaml", "--prompts", "PromptFile", "--prompts.path", "a.txt", *held_out, "b.txt")
    assert "got 'a.txt'" in text
    assert "got 'b.txt'" in text
    assert text.count("Shipped lists: ") == 1


@pytest.mark.parametrize(("asked", "there", "meant"), [
    ("x.txt", "b.txt", None),
    ("red.txt", "blue.txt", None),
    ("counts.csv", "count.tsv", None),
    ("counts.csv", "count.csv", "count.csv"),
    ("count.TXT", "counts.txt", "counts.txt"),
    ("b.csv", "b.tsv", "b.tsv"),
])  # fmt: skip
def test_prompt_files_are_similar_by_their_names_not_by_their_suffixes(asked, there, meant):
    Path("lists").mkdir()
    Path("lists", there).write_text("prompt\na\n")
    with pytest.raises(ConfigError) as caught:
        read_prompts(f"lists/{asked}")
    assert str(caught.value).endswith(f" Did you mean lists/{meant}?") == (meant is not None)
    assert ("Shipped lists: " in str(caught.value)) == (meant is None)


def test_a_full_disk_is_called_so_where_torch_only_counts_bytes(monkeypatch, tmp_path):
    def full(state, file):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 7104 vs 6998\nframe #0: c10::ThrowEnforceNotMet")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError) as caught:
        save(ring_loop(), tmp_path / "step-000001", 1, "")
    assert "cannot be written: the disk is full, or a quota is reached (torch: [enforce fail at inline_container.cc:672]" in str(
        caught.value
    )
    assert str(caught.value).endswith("there is none yet; make room and resume.")
    assert "frame" not in str(caught.value)
