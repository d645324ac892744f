"""A reward that failed in the middle of an evaluation, and was mended: no score of its old code is left in the result."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from toy import TOY

from diffalign.cli import main

FAILING = """
def careful(images, prompts):
    if "four" in map(str, prompts):
        raise ValueError("I cannot count so far")
    return images.new_zeros(len(images))
"""
MENDED = """
def careful(images, prompts):
    return images.new_ones(len(images))
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "held-out.txt").write_text("one\ntwo\nthree\nfour\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


def write(code: str) -> None:
    Path("my_scores.py").write_text(code)
    sys.modules.pop("my_scores", None)
    importlib.invalidate_caches()


@pytest.mark.parametrize("asked", [True, False])
def test_rounds_that_old_code_has_scored_are_scored_again(place: Path, capsys: pytest.CaptureFixture[str], asked: bool) -> None:
    """As a reward of the command line, and as one of the run."""
    Path("toy.yaml").write_text(TOY if asked else TOY.replace("rewards: JPEGCompressibility", "rewards: {careful: my_scores.careful}"))
    arguments = ["evaluate", "toy.yaml", "--prompts", "held-out.txt", "--samples", "2", "--steps", "2", "--rows", "2", "--out", "out"]
    arguments += ["--reward", "careful=my_scores.careful"] if asked else []
    write(FAILING)
    assert main(arguments) == 1
    assert "I cannot count so far" in capsys.readouterr().err
    assert len(list(place.glob("out/rounds/*/*.safetensors"))) == 3
    write(MENDED)
    assert main(arguments) == 0
    assert json.loads((place / "out" / "evaluation.json").read_text())["rewards"]["careful"] == 1.0
