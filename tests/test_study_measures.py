"""What the studies measure, on inputs whose values are known."""

import json

import numpy as np
import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.study import distilled, ground, shapeworld, tmpo
from benchmarks.subjects.surrogate_order import pairs_ordered
from diffalign import Prompt
from diffalign.shapeworld import parse
from diffalign.shapeworld.render import draw


def drawn(caption, *seeds):
    return torch.stack([torch.from_numpy(draw(parse(Prompt(caption)), np.random.default_rng(seed))) for seed in seeds])


def test_a_surrogate_orders_pairs_within_groups_alone():
    rewards, group = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([0, 0, 0, 1])
    assert pairs_ordered(torch.tensor([3.0, 1.0, 2.0, -9.0]), rewards, group) == 1.0
    assert pairs_ordered(torch.tensor([1.5, 1.0, 2.0, 9.0]), rewards, group) == 0.5
    with pytest.raises(ValueError, match="two different rewards"):
        pairs_ordered(rewards, torch.ones(4), group)


def test_a_longer_run_of_a_seed_counts_once_unless_its_rate_falls():
    row = {"step": 150, "reward": 0.9, "even": 0.9, "modes": 4.0, "distance": 1.8, "from tilt": 0.1, "nats": 1.0}
    runs = [
        {"task": "even", "arm": "softmax-tb", "rate": 1e-4, "last": last, "seed": seed, "steps": steps, "rows": [row]}
        for seed, steps, last in ((0, 600, 1.0), (0, 6000, 1.0), (1, 600, 1.0), (0, 300, 0.1), (0, 600, 0.1), (1, 600, 0.1))
    ]
    found = [" ".join(line.split("reward")[0].split()[2:]) for line in tmpo.table(runs, search=False).splitlines()]
    assert found == ["1e-04 to 1e-05 in 300 150 n=1", "1e-04 to 1e-05 in 600 150 n=2", "1e-04 150 n=2"]
    assert tmpo.table(runs, search=True) == ""


def test_averages_are_kept_apart_and_are_no_weights(tmp_path, monkeypatch):
    """An averaged run is not taken for one of the weights themselves, and gives other numbers from its second step on."""
    monkeypatch.setattr(tmpo, "MEASURED", (1, 3))
    monkeypatch.setattr(tmpo, "ROOTS", 8)
    monkeypatch.setattr(tmpo, "exact_tilt", lambda task, beta, noise: torch.full((10,), 0.1, dtype=torch.float64))
    file = tmp_path / "study.json"
    for average in (0.5, 0.0, 0.5):
        tmpo.main(arms=("softmax-tb",), seeds=1, steps=3, rates=(1e-3,), average=average, json=file)
    content = json.loads(file.read_text())
    (averaged,), (plain,) = content["averages"], content["runs"]
    assert averaged["average"] == 0.5
    assert "average" not in plain
    assert averaged["rows"][-1]["nats"] != plain["rows"][-1]["nats"]
    assert "average 0.5" in tmpo.table(content["averages"], search=False)


def distilled_entry(arm, steps, even, **more):
    about = {"arm": arm, "steps": steps, "rate": 1e-4 * bool(steps), "distilled": 0, "student_rate": 0.0, "seed": 0, "rows": 2000.0}
    return {**about, "row": {"even": even, "even, held out": even / 2}, **more}


def test_what_a_student_keeps_is_a_share_of_its_teachers_gain():
    curve = [{"rows": 1000.0, "row": {"even": 0.3, "even, held out": 0.2}}, {"rows": 4000.0, "row": {"even": 0.6, "even, held out": 0.1}}]
    runs = [distilled_entry("base", 0, 0.2), distilled_entry("teacher, even", 9, 0.6), distilled_entry("distilled", 9, 0.5)]
    table = distilled.table([*runs, distilled_entry("mixture", 9, 0.6, curve=curve)], search=False).splitlines()
    assert [" ".join(line.split("n=1")[1].split()) for line in table] == [
        "even 0.200 even, held out 0.100",
        "even 0.600 keeps 1.00 even, held out 0.300 keeps 1.00",
        "even 0.500 keeps 0.75 even, held out 0.250 keeps 0.75",
        "even 0.300 keeps 0.25 even, held out 0.200 keeps 0.50",
        "even 0.600 keeps 1.00 even, held out 0.100 keeps 0.00",
    ]
    assert table[3].startswith("mixture, 1 thousand rows ")


def test_a_short_study_of_teachers_gives_the_mixture_the_rows_of_all(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(distilled, "PICTURES", 24)
    file = tmp_path / "study.json"
    for _ in range(2):  # the second time, all of it is read
        distilled.main(seeds=1, steps=1, distilled=1, folder=tmp_path, json=file)
    runs = {entry["arm"]: entry for entry in json.loads(file.read_text())["runs"]}
    assert list(runs) == ["base", "teacher, even", "teacher, thick", "teacher, asked", "distilled", "mixture"]
    assert capsys.readouterr().out.count("distilled 0 ") == 1
    own, together = runs["distilled"]["rows"], sum(runs[f"teacher, {task}"]["rows"] for task in distilled.TASKS)
    for point, rows in zip(runs["mixture"]["curve"], (own, own + together), strict=True):
        assert abs(point["rows"] - rows) <= together / 3 / 2 + 1  # half a step


def test_a_short_study_of_shapeworld_is_made_once(tmp_path, monkeypatch, capsys):
    """The smallest run, as a GPU would make it: scored by a process of its own, and kept with its settings."""
    file = tmp_path / "study.json"
    size = ["--steps", "1", "--groups", "1", "--prompts", "1", "--samples", "2", "--workers", "1"]
    words = ["study", "shapeworld", "--arms", "base", "flow-grpo", "--seeds", "1", *size, "--json", str(file)]
    assert main(words) == 0
    first = capsys.readouterr().out
    base, trained = json.loads(file.read_text())["runs"]
    about = {"seed": 0, "prompts": 1, "samples": 2}
    assert base.items() >= {**about, "arm": "base", "steps": 0, "groups": 0, "rate": 0.0}.items()
    assert trained.items() >= {**about, "arm": "flow-grpo", "steps": 1, "groups": 1, "rate": 1e-3}.items()
    assert trained["seconds"] > 0
    (before,), (after,) = base["rows"], trained["rows"]
    assert (before["step"], after["step"]) == (0, 1)
    for row in (before, after):
        assert row.keys() >= {"step", "reward", "exact", "L-GMD"}
        assert 0 <= row["exact"] <= row["reward"] <= 1
    assert before["L-GMD"] != after["L-GMD"]  # the same noise, through weights that have moved
    reported = first.split("reported\n")[1]
    assert [line.split("groups")[0].split()[0] for line in reported.splitlines()] == ["base", "flow-grpo"]
    written = file.read_bytes()
    for name in ("run", "untrained"):  # nothing is made twice
        monkeypatch.setattr(shapeworld, name, pytest.fail)
    assert main(words) == 0
    assert capsys.readouterr().out.split("reported\n")[1] == reported
    assert file.read_bytes() == written


def test_fields_count_where_shapes_stand():
    one = drawn("one red circle", 0)
    assert float(shapeworld.fields(one.repeat(5, 1, 1, 1))) == pytest.approx(1.0)
    assert 4 < float(shapeworld.fields(drawn("one red circle", *range(24)))) <= 16


def test_the_ground_of_a_drawn_picture_is_smooth():
    images = drawn("two yellow circles", 0, 1)
    torch.manual_seed(0)
    assert ground.roughness(images) == pytest.approx(0.0, abs=1e-6)
    assert ground.roughness(images + 0.01 * torch.randn(2, 1, 64, 64)) > 0.01
