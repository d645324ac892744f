"""The notebook, cell by cell, with fewer steps; it is kept without outputs, which would be stale."""

import json
from pathlib import Path

import torch

FILE = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"
CELLS = json.loads(FILE.read_text())["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def test_every_cell_runs_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first, *rest = CODE
    assert "STEPS = 20" in first
    assert "PROMPTS = 4" in first
    names: dict = {}
    for place, cell in enumerate([first.replace("= 20", "= 1").replace("= 4", "= 1"), *rest]):
        exec(compile(cell, f"{FILE.name}, cell {place}", "exec"), names)
    assert [set(row) >= {"reward", "diversity/l_gmd"} for row in names["table"].rows] == [True]
    assert not torch.equal(names["before"], names["after"])
    assert capsys.readouterr().out.count("  reward ") == 1
    assert (tmp_path / "runs/notebook-lora/pytorch_lora_weights.safetensors").exists()


def test_the_file_is_a_notebook_without_outputs():
    assert json.loads(FILE.read_text())["nbformat"] == 4
    assert len({cell["id"] for cell in CELLS}) == len(CELLS)
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CELLS if cell["cell_type"] == "code")
