"""The study of the hacking alarm: replays, noise, and the table in the documentation."""

import json
import re
from pathlib import Path

import torch

from benchmarks.study import alarm as study

ROOT = Path(__file__).parents[1]
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "alarm_study.json").read_text())


def recorded(folder, held_out):
    folder.mkdir()
    lines = [
        {
            "step": step,
            "trained": 0.1 * step,
            "diversity": 0.01 * (step % 2),
            "held_out": {"judge": value},
            "spread": {"judge": 0.3},
            "errors": {"judge": 0.05},
            "groups": 10,
        }
        for step, value in enumerate(held_out)
    ]
    (folder / "watch.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_recorded_run_is_put_to_the_rule(tmp_path):
    level = [0.7, 0.74, 0.66, 0.7, 0.73, 0.67] * 3
    healthy, hacked = study.replayed(recorded(tmp_path / "a", level)), study.replayed(recorded(tmp_path / "b", [*level, *[0.3] * 6]))
    assert (healthy["alarms"], healthy["steps"]) == ({}, 18)
    assert hacked["alarms"] == {"judge": 21}, "it convinces with two fallen steps of three, and with three"
    assert hacked["nearest"]["judge"] < -4.5 < healthy["nearest"]["judge"] < 0


def test_noise_rings_more_often_at_a_lower_threshold():
    shares = list(study.noisy(20, 30, groups=10, correlation=0.6, spread=0.1).values())
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0


def test_hacks_like_what_they_are_named_after():
    flat, drawn = torch.tensor([0.9, 0.1, 0.1])[:, None, None].expand(3, 8, 8).clone(), torch.ones(3, 8, 8)
    drawn[:, ::2, ::2] = 0.0
    for hack in (study.red, study.loud):
        scores = hack(torch.stack([flat, drawn]), [])
        assert scores[0] > scores[1]
    assert study.red(flat[None], []) == 0


def test_what_was_measured_is_what_the_page_says():
    page = (ROOT / "docs" / "metrics.md").read_text()
    rows = re.findall(r"^\| (red|loud) \| (\d) \| (\d+) of (\d+) \| ([\d.]+) % \|", page, flags=re.MULTILINE)
    found = [(row["hack"], str(row["seed"]), str(row["step"]), str(row["total"]), f"{100 * row['share']:.1f}") for row in RESULTS["hacked"]]
    assert sorted(rows) == sorted(found)
    assert len(rows) >= 6
    assert sum(not row["alarms"] for row in RESULTS["healthy"]) == len(RESULTS["healthy"]) >= 5
