"""Runs on equal prompts and noise, and at equal cost."""

import json

import attrs
import pytest
import torch
from browser import NEEDS_BROWSER, visit
from ring import MODES, rewarded

from diffalign.core import Prompt
from diffalign.evaluation import Comparison, Recorded, at_equal_budgets, evaluate, paired_change, write_comparison
from diffalign.policies import GaussianMixturePolicy

PROMPTS = [Prompt(name) for name in ("one", "two & three", "four")]


def measured(weights, **settings):
    policy = GaussianMixturePolicy(MODES, 0.3, weights=weights)
    return evaluate(policy, PROMPTS, {"near": rewarded}, **{"samples": 4, "steps": 5, **settings})


@pytest.fixture(scope="module")
def comparison():
    """All modes; the rewarded ones; a single one of the rewarded."""
    return Comparison({"all": measured([1.0] * 8), "half": measured([1, 1e-6] * 4), "single": measured([1, *[1e-6] * 7])})


def test_numbers_of_a_comparison(comparison):
    runs = comparison.runs
    means = comparison.means()
    assert means["reward near"]["half"].mean > 0.7 > means["reward near"]["all"].mean
    change = comparison.differences()["reward near"]
    assert set(change) == {"half", "single"}
    assert change["half"] == paired_change(runs["all"].rewards["near"].mean(1), runs["half"].rewards["near"].mean(1))
    wins = comparison.win_rates()["near"]
    assert set(wins) == {("all", "half"), ("all", "single"), ("half", "single")}
    by_hand = (runs["all"].rewards["near"] > runs["half"].rewards["near"]).float().mean().item()
    assert wins["all", "half"].mean == pytest.approx(by_hand)


def test_the_front_leaves_out_what_is_beaten_in_both(comparison):
    reward = {run: interval.mean for run, interval in comparison.means()["reward near"].items()}
    spread = {run: interval.mean for run, interval in comparison.means()["diversity l_gmd"].items()}
    expected = [run for run in reward if not any(reward[o] > reward[run] and spread[o] > spread[run] for o in reward)]
    assert comparison.front("near") == expected
    alike = Comparison({"a": comparison.runs["all"], "b": comparison.runs["all"]})
    assert alike.front("near") == ["a", "b"], "equal runs do not beat each other"
    shifted = attrs.evolve(comparison.runs["all"], rewards={"near": comparison.runs["all"].rewards["near"] + 1})
    assert Comparison({"a": comparison.runs["all"], "b": shifted}).front("near") == ["b"]


def test_what_differs_in_more_than_the_weights_is_refused(comparison):
    with pytest.raises(ValueError, match="all and other must be evaluated on equal prompts, noise and rewards"):
        Comparison({"all": comparison.runs["all"], "other": measured([1.0] * 8, seed=1)})
    with pytest.raises(ValueError, match="at least 2 runs; got all"):
        Comparison({"all": comparison.runs["all"]})


def entry(step, rewards, **settings):
    rows = [{"prompt": str(p), "rewards": {"near": r}, "diversity": {"l_gmd": -r}} for p, r in zip(PROMPTS, rewards, strict=True)]
    mean = sum(rewards) / len(rewards)
    base = {"samples": 4, "steps": 5, "seed": 0, **settings}
    return {"step": step, **base, "rewards": {"near": mean}, "diversity": {"l_gmd": -mean}, "by_prompt": rows}


def recorded(folder, name, steps, rows, seconds, entries):
    folder.mkdir(parents=True)
    lines = [
        {"step": step, "rows/policy/rollout": rows - 1, "rows/reference/update": 1, "seconds/rollout": seconds} for step in range(steps)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "evaluation.json").write_text(json.dumps(entries))
    return Recorded.of(name, folder)


@pytest.fixture
def two(tmp_path):
    """The first takes 10 rows and 4 s a step for 4 steps; the second 5 rows and 1 s a step for 6 steps."""
    first = recorded(tmp_path / "a", "a", 4, 10, 4.0, [entry(step, [0.1 * step] * 3) for step in (0, 2, 4)])
    values = {0: [0.0, 0.0, 0.0], 2: [0.1, 0.2, 0.3], 4: [0.2, 0.3, 0.4], 6: [0.3, 0.4, 0.8]}
    second = recorded(tmp_path / "b", "b", 6, 5, 1.0, [entry(step, values[step]) for step in values])
    return first, second


def test_equal_budgets_by_hand(two):
    table, notes = at_equal_budgets(two)
    assert notes == []
    steps = {budget: [(run.run, run.step, run.cost) for run in runs] for budget, runs in table.items()}
    assert steps["steps"] == [("a", 4, 4.0), ("b", 4, 4.0)]  # 4 steps each
    assert steps["rows"] == [("a", 2, 20.0), ("b", 6, 30.0)]  # 30 rows: a has an evaluation at 20
    assert steps["seconds"] == [("a", 0, 0.0), ("b", 6, 6.0)]  # 6 s: a has none but the first
    change = table["steps"][1].changes["reward near"]
    assert change.mean == pytest.approx(0.3 - 0.4)
    assert table["rows"][1].changes["reward near"].mean == pytest.approx(0.5 - 0.2)
    assert table["steps"][0].changes == {}


def test_runs_on_other_prompts_are_left_out_with_a_reason(two, tmp_path):
    other = recorded(tmp_path / "c", "c", 2, 5, 1.0, [entry(0, [0.0] * 3, seed=7)])
    bare = recorded(tmp_path / "d", "d", 2, 5, 1.0, [])
    table, notes = at_equal_budgets([*two, other, bare])
    assert [run.run for run in table["steps"]] == ["a", "b"]
    assert notes == ["d has no held-out evaluation in its folder", "c was evaluated on other prompts or noise than a"]
    assert at_equal_budgets([two[0], other])[0] == {}


def test_a_checkpoint_counts_up_to_its_own_step(two, tmp_path):
    early = Recorded.of("early", tmp_path / "b", last=3)
    assert [found["step"] for found in early.evaluations] == [0, 2]
    assert early.spent() == {"steps": 2.0, "rows": 10.0, "seconds": 2.0}


@pytest.fixture
def page(comparison, two, tmp_path):
    runs = {"a": comparison.runs["all"], "b": comparison.runs["half"]}
    return write_comparison(tmp_path / "out", Comparison(runs), two)


def test_page_picture_and_numbers(page):
    text = page.read_text()
    assert "<title>a against b</title>" in text
    for heading in ("Reward and diversity", "Paired differences to a", "Win rates", "Pictures", "At equal network rows", "two &amp; three"):
        assert heading in text
    table = json.loads((page.parent / "compare.json").read_text())
    assert table["difference_to"] == "a"
    assert table["win_rates"]["near"][0]["against"] == "b"
    assert [run["step"] for run in table["equal"]["rows"]] == [2, 6]
    assert set(table["front"]["near"]) == {"l_gmd", "ms_ssim_distance", "cosine/pixels", "vendi/pixels", "modes/pixels"}
    assert (page.parent / "compare.png").exists()


@NEEDS_BROWSER
def test_page_in_a_browser(page, tmp_path):
    seen = visit(page, tmp_path)
    assert (seen.console, seen.requests) == ([], [])
    assert seen.probe["needed"] <= seen.probe["width"]
    assert all(complete and width > 0 for complete, width, _ in seen.probe["images"])
    ((opened, large, before, still_open),) = seen.probe["enlarged"]
    assert opened
    assert large > before
    assert not still_open


def test_values_are_those_of_the_evaluations(comparison):
    plain = comparison.plain()
    assert plain["runs"]["half"]["rewards"]["near"] == pytest.approx(comparison.runs["half"].rewards["near"].mean().item())
    assert torch.equal(comparison.runs["all"].l_gmd, comparison.runs["all"].diversity["l_gmd"])
