"""The measurement of how much of a gradient is signal."""

import json

import pytest
import torch

from benchmarks.study.gradient_noise import main, signal


def test_signal_is_the_squared_cosine_with_the_true_gradient():
    generator = torch.Generator().manual_seed(0)
    true = torch.zeros(50, dtype=torch.float64)
    true[0] = 2.0
    gradients = true + torch.randn(400, 50, generator=generator, dtype=torch.float64)  # E |g|^2 = 4 + 50
    share, error = signal(gradients @ gradients.T)
    assert abs(share - 4 / 54) < 3 * error
    assert error < 0.02
    noise, error = signal((gradients - true) @ (gradients - true).T)
    assert abs(noise) < 3 * error


def test_a_run_is_measured_and_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main("shapeworld_tmpo", changes=("prompts_per_step=1",), batches=2, json=tmp_path / "table.json")
    layers = json.loads((tmp_path / "table.json").read_text())["layers"]
    assert layers.pop("all")["share of the squared norm"] == pytest.approx(1.0)
    assert sum(row["share of the squared norm"] for row in layers.values()) == pytest.approx(1.0)
    assert any("text_embedder" in kind for kind in layers)
    assert not any("lora_A" in kind for kind in layers)
    assert not (tmp_path / "runs").exists()
