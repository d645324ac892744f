"""The examples, shortened, in processes of their own as a user starts them."""

import json
from pathlib import Path

import pytest
from PIL import Image
from started import start

ROOT = Path(__file__).parents[1]


def test_quickstart(tmp_path):
    done = start(ROOT / "examples/quickstart.py", "--total", 1, "--prompts", 1, "--json", "table.json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in json.loads((tmp_path / "table.json").read_text())] == [0]
    assert (tmp_path / "runs/quickstart-lora/pytorch_lora_weights.safetensors").exists()


def test_the_demo_sets_two_objectives_side_by_side(tmp_path):
    done = start(ROOT / "examples/digits.py", "--steps", 3, "--out", "some/digits.png", "--json", "table.json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "table.json").read_text())
    assert list(table) == ["base", "Flow-GRPO", "Softmax-TB"]
    assert 0.3 < table["base"]["reward"] < table["Flow-GRPO"]["reward"] < 0.9
    assert table["base"]["reward"] < table["Softmax-TB"]["reward"]
    assert Image.open(tmp_path / "some/digits.png").size == (1022, 356)


def test_three_teachers_become_one_student(tmp_path):
    done = start(
        ROOT / "examples/digits_distilled.py", "--steps", 3, "--distilled", 4, "--pictures", 120, "--json", "table.json", folder=tmp_path
    )
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "table.json").read_text())
    assert all(table["base"][task] < table[f"teacher of {task!r}"][task] for task in ("even", "thick", "asked"))
    assert all(table["base"][task] < table["student"][task] for task in ("even", "thick"))


def test_built_in_run_outside_the_checkout(tmp_path):
    short = ["--total", 2, "--prompts_per_step", 1, "--evaluation.samples", 2, "--evaluation.steps", 2]
    done = start("-m", "diffalign", "train", "shapeworld_tmpo", *short, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "diversity (L-GMD)" in done.stdout
    folder = tmp_path / "runs/shapeworld_tmpo"
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "evaluation.json", "report.html", "images/before-after.png"):
        assert (folder / name).exists(), name
    assert (folder / "lora/pytorch_lora_weights.safetensors").exists()
    assert (folder / "step-000002/manifest.json").exists()
    rows = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert rows["contract/deviation"] < 1e-4


def test_benchmarks_print_and_write_their_table(tmp_path):
    short = ["--steps", 1, "--prompts", 1, "--json", "table.json"]
    done = start("-m", "benchmarks", "cost", "overhead", *short, folder=tmp_path, environment={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    shares = json.loads((tmp_path / "table.json").read_text())["shares"]
    assert sum(shares.values()) == pytest.approx(1.0)
    assert "everything else" in done.stdout
