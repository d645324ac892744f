"""`diffalign evaluate` and `diffalign compare` of few-step students: they are drawn with their own number of steps."""

import json
from pathlib import Path

import pytest

from diffalign.cli import main
from diffalign.embedded import DIGITS

FEW = ["--prompts", "digits/set-held-out", "--samples", "2", "--out", "out"]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two run files of the untrained student, one of them with an evaluation that gives no steps."""
    text = (DIGITS / "runs" / "digits_tdm.yaml").read_text()
    (tmp_path / "without.yaml").write_text(text.partition("evaluation:\n")[0])
    (tmp_path / "open.yaml").write_text(text.removesuffix("    steps: 4\n"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("run", ["without.yaml", "open.yaml"])
def test_a_student_is_measured_with_its_own_steps(runs: Path, run: str) -> None:
    assert main(["evaluate", run, *FEW]) == 0
    assert json.loads((runs / "out" / "evaluation.json").read_text())["steps"] == 4


def test_students_are_compared_with_their_own_steps(runs: Path) -> None:
    assert main(["compare", "without.yaml", "open.yaml", *FEW]) == 0
    assert json.loads((runs / "out" / "compare.json").read_text())["steps"] == 4
