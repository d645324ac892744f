"""The benchmark of a student for several numbers of steps, shortened."""

import json

import torch

from benchmarks.study import ring_steps
from diffalign import Prompt


def test_the_table_has_every_student_at_every_number(monkeypatch, tmp_path):
    monkeypatch.setattr(ring_steps.ring_tdm_r1, "points_of", lambda policy, steps: torch.randn(200, 2))
    ring_steps.main(pretrain=3, distil=2, json=tmp_path / "table.json")
    table = json.loads((tmp_path / "table.json").read_text())
    kinds = ("base", "one for all", "one for all, three times", "alone")
    assert table.keys() == {f"{kind}, {steps} steps" for kind in kinds for steps in (1, 2, 4)}


def test_the_network_reads_the_number_from_the_tag():
    policy = ring_steps.ReadsSteps(ring_steps.ring.trained_base(0, 1))
    texts = ["a point", "a point in 1 steps", "a point in 2 steps", "a point in 4 steps"]
    assert policy.encode([Prompt(text) for text in texts]).tensors["steps"].tolist() == [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]
