"""The study of clicks: a short run of it, and its measures."""

import json

import pytest
import torch

from benchmarks.study.clicks import Slanted, Thicker, main, shear, votes_needed
from diffalign.digits import split


def test_a_short_run_is_kept_and_not_made_again(tmp_path, capsys):
    words = {
        "arms": ("TMPO, model", "TMPO, no model"),
        "tastes": ("even",),
        "errors": (0.1,),
        "seeds": 1,
        "set": ("total=1", "prompts_per_step=2", "sampler.plan.splits=[1]"),
        "json": tmp_path / "study.json",
    }
    main(**words)
    runs = json.loads((tmp_path / "study.json").read_text())["runs"]
    assert [[point["votes"] for point in run["curve"]] for run in runs] == [[0, 6], [0, 6]]
    assert all(0 < point["liked"] < 1 for run in runs for point in run["curve"])
    first = capsys.readouterr().out
    main(**words)
    assert "even     0.1 TMPO, model " in first
    assert capsys.readouterr().out in first


def test_votes_are_counted_until_the_share_is_reached():
    points = [{"votes": 0, "liked": 0.5}, {"votes": 12, "liked": 0.8}, {"votes": 24, "liked": 0.7}]
    assert votes_needed(points) == 12
    assert votes_needed(points[:1]) is None


def test_shear_is_that_of_the_strokes():
    upright, leaning = torch.zeros(2, 8, 8)
    upright[:, 3] = 1.0
    leaning[range(8), [7 - row for row in range(8)]] = 1.0
    assert shear(torch.stack([upright, leaning, leaning.flip(1)])).tolist() == pytest.approx([0.0, 1.0, -1.0])


@pytest.mark.parametrize("taste", [Slanted(), Thicker()])
def test_tastes_split_real_digits(taste):
    real = (split()[0].latents[:200].expand(-1, 3, -1, -1) + 1) / 2
    share = float(taste(real, [""] * 200).mean())
    assert 0.1 < share < 0.6
