"""The benchmark of real model sizes on its tiny networks: what it counts, and what it writes."""

import json

import attrs
import pytest
import torch

from benchmarks.cost import families
from benchmarks.subjects import random_families
from diffalign.samplers import FixedPlan


def test_a_step_is_counted_in_both_orders(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(families.SCHEDULES, families.TINY_FLUX, (5, FixedPlan((1, 2))))  # 9 leaves
    few = {"families": ("flux",), "ways": ("diffalign", "checkpointing", "release"), "json": tmp_path / "families.json"}
    options = families.Options(tiny=True, device="cpu", repeats=1, rows=3, sub_batch=3, peak=1e-3, **few)
    families.main(options)
    written = json.loads((tmp_path / "families.json").read_text())
    (family,) = written["families"].values()
    model, ways = family["model"], family["ways"]
    assert list(ways) == ["diffalign", "checkpointing", "release"]
    assert {row["rollout_rows"] for row in ways.values()} == {1 + 1 + 3 + 9 + 9}
    assert {name: row["rollout_calls"] for name, row in ways.items()} == {"diffalign": 5, "checkpointing": 5, "release": 23}
    assert {name: row["gradient_rows"] for name, row in ways.items()} == {"diffalign": 4, "checkpointing": 4, "release": 2 * 9}
    assert {name: row["update_calls"] for name, row in ways.items()} == {"diffalign": 2, "checkpointing": 1, "release": 2 * 3}
    for row in ways.values():
        assert row["deviation"] == 0.0
        assert row["rounding"] < 1e-4
        assert row["peak_bytes"] > 0
        useful = row["gradient_rows"] * (model["forward"] + model["backward"])
        assert row["update_mfu"] == pytest.approx(useful / row["update_s"] / 1e9)
        assert row["rollout_mfu"] == pytest.approx(row["rollout_rows"] * model["forward"] / row["rollout_s"] / 1e9)
    assert "diffalign" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"families.json must be of options .*'rows': 2.*; it is of .*give another --json file"):
        families.main(attrs.evolve(options, rows=2))


def test_rows_are_halved_until_they_fit_and_what_is_there_is_not_measured_again(monkeypatch):
    asked = []

    def measure(way, shape, model, options, prompts, budget):
        asked.append((way.name, prompts, budget))
        if (budget or 27 * prompts) > 10:
            raise torch.OutOfMemoryError("too many rows")
        return {"rows_at_once": budget}

    monkeypatch.setattr(families, "measure", measure)
    options = families.Options(ways=("filled", "release"), prompts=(1, 2), tiny=True)
    table = {"release": {}}
    assert list(families.ways_of(families.TINY_FLUX, None, options, table, end=float("inf"))) == [
        "filled",
        "filled, 2 prompts",
        "release, 2 prompts",
    ]
    assert asked == [("filled", 1, rows) for rows in (None, 13, 6)] + [
        *(("filled", 2, rows) for rows in (None, 27, 13, 6)),
        ("release", 2, None),
    ]
    assert table == {"release": {}, "filled": {"rows_at_once": 6}, "filled, 2 prompts": {"rows_at_once": 6}, "release, 2 prompts": {}}
    assert not list(families.ways_of(families.TINY_FLUX, None, options, {"release": {}}, end=0.0))  # the time is over


def linear(tokens, *sizes):
    return sum(2 * tokens * inputs * outputs for inputs, outputs in sizes)


def test_operations_are_those_of_the_matrix_products():
    counted = random_families.counted(random_families.TINY_FLUX)
    width, image, text, rank = 128, 16, 32, 8
    both = image + text
    attention = 4 * both**2 * width

    def with_adapter(tokens, inputs, outputs):
        return linear(tokens, (inputs, outputs), (inputs, rank), (rank, outputs))

    one = sum(
        4 * with_adapter(n, width, width) + with_adapter(n, width, 4 * width) + with_adapter(n, 4 * width, width) for n in (image, text)
    )
    double = one + attention + 2 * linear(1, (width, 6 * width))
    single = (
        3 * with_adapter(both, width, width)
        + linear(both, (width, 4 * width), (5 * width, width))
        + attention
        + linear(1, (width, 3 * width))
    )
    times = 2 * linear(1, (256, width), (width, width)) + linear(1, (32, width), (width, width))
    ends = linear(image, (64, width), (width, 64)) + linear(text, (32, width)) + linear(1, (width, 2 * width))
    assert counted.forward == double + 2 * single + times + ends
    # gradients of activations cost as much again; of attention both sides; of frozen weights nothing
    assert counted.forward < counted.backward < 1.3 * counted.forward


def test_the_published_shape_has_the_published_size():
    counted = random_families.counted(random_families.SD35_MEDIUM)
    assert counted.weights == pytest.approx(2.24e9, rel=0.005)
    assert counted.adapter == sum(4 * 32 * 2 * 1536 for _ in range(24))
    assert 2 * 1024 * 1e9 < counted.forward < 2 * (1024 + 333) * counted.weights  # a token passes one of two streams


def test_nothing_but_the_denoiser_is_there():
    policy = random_families.policy_of(random_families.TINY_SD35, torch.bfloat16, "cpu")
    assert policy.precision == torch.bfloat16
    assert {tensor.dtype for tensor in policy.trainable_parameters().values()} == {torch.float32}
    parts = {name: part for name, part in policy.family.pipeline.components.items() if part is not None}
    assert set(parts) == {"transformer", "scheduler"}
    with pytest.raises(AttributeError):
        policy.decode(torch.zeros(1, *policy.latent_shape))
