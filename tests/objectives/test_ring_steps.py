"""The benchmark of a student for several numbers of steps, shortened."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from diffalign import Prompt

ROOT = Path(__file__).parents[2]


@pytest.fixture
def program(monkeypatch):
    """As its folder gives it: the tests have modules of the same names."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    for file in ("examples/ring.py", "examples/ring_tdm_r1.py", "benchmarks/ring_steps.py"):
        spec = importlib.util.spec_from_file_location(Path(file).stem, ROOT / file)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
    return module


def test_the_table_has_every_student_at_every_number(program, monkeypatch, tmp_path):
    arguments = ["--pretrain", "3", "--distil", "2", "--json", str(tmp_path / "table.json")]
    monkeypatch.setattr(sys, "argv", ["ring_steps.py", *arguments])
    monkeypatch.setattr(program.ring_tdm_r1, "points_of", lambda policy, steps: torch.randn(200, 2))
    program.main()
    table = json.loads((tmp_path / "table.json").read_text())
    kinds = ("base", "one for all", "one for all, three times", "alone")
    assert table.keys() == {f"{kind}, {steps} steps" for kind in kinds for steps in (1, 2, 4)}


def test_the_network_reads_the_number_from_the_tag(program):
    policy = program.ReadsSteps(program.ring.trained_base(0, 1))
    texts = ["a point", "a point in 1 steps", "a point in 2 steps", "a point in 4 steps"]
    assert policy.encode([Prompt(text) for text in texts]).tensors["steps"].tolist() == [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]
