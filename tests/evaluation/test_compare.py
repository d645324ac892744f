"""Runs on equal prompts and noise, and at equal cost."""

import json

import attrs
import pytest
import torch
from browser import NEEDS_BROWSER, visit
from ring import MODES, rewarded

from diffalign.core import Partial, Prompt
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
    with pytest.raises(ValueError, match="all and other must be evaluated on equal prompts, noise and features"):
        Comparison({"all": comparison.runs["all"], "other": measured([1.0] * 8, seed=1)})
    with pytest.raises(ValueError, match="at least 2 runs; got all"):
        Comparison({"all": comparison.runs["all"]})


def scored(result, rewards):
    """The evaluation with a reward that applies to some prompts: place -> reward of all samples."""
    known = torch.tensor([place in rewards for place in range(len(PROMPTS))])
    values = torch.tensor([[value] * 4 for value in rewards.values()])
    return attrs.evolve(result, rewards={**result.rewards, "votes": values}, scored={"votes": known})


def test_a_reward_of_some_prompts_is_compared_on_those_that_it_scored_in_both(comparison, tmp_path):
    """By place in a list, all three differences would be 1, of which two are about different prompts."""
    all_, half = comparison.runs["all"], comparison.runs["half"]
    runs = Comparison({"a": scored(all_, {0: 1.0, 2: 5.0}), "b": scored(half, {1: 2.0, 2: 4.0})})
    assert {run: mean.mean for run, mean in runs.means()["reward votes"].items()} == {"a": 5.0, "b": 4.0}
    assert runs.differences()["reward votes"]["b"].mean == -1.0
    assert runs.win_rates()["votes"]["a", "b"].mean == 1.0
    assert runs.differences()["reward near"] == Comparison({"a": all_, "b": half}).differences()["reward near"]
    assert runs.front("votes") == [run for run in ("a", "b") if run == "a" or half.l_gmd.mean() > all_.l_gmd.mean()]
    text = write_comparison(tmp_path, runs).read_text()
    assert text.count("<td>reward votes (over 1 prompt)</td>") == 2
    assert "<th>votes (over 1 prompt)</th>" in text
    assert json.loads((tmp_path / "compare.json").read_text())["paired_prompts"] == {"reward votes": 1}
    assert "(over" not in write_comparison(tmp_path, Comparison({"a": all_, "b": half})).read_text()


def faces(value, *seen):
    """A run whose reward gives `value`, to the samples `seen` of each prompt alone."""

    def face(images, prompts):
        places = torch.arange(len(images)) % 4
        return Partial(torch.full((len(images),), value), torch.isin(places, torch.tensor(seen)))

    return evaluate(GaussianMixturePolicy(MODES, 0.3), PROMPTS, {"face": face}, samples=4, steps=2)


def test_an_image_without_a_score_neither_wins_nor_loses(tmp_path):
    """With the mean of the others in its place, a would win 12 of 12 images against b, and 9 of 12 against c."""
    a, b = faces(0.9, 0), faces(0.8, 0, 1, 2, 3)
    c = attrs.evolve(b, rewards={"face": torch.tensor([[0.95, 0.8, 0.8, 0.8], [0.95, 0.8, 0.8, 0.8], [0.9, 0.8, 0.8, 0.8]])})
    assert a.applies["face"].tolist() == [[True, False, False, False]] * 3
    assert b.applies == {}
    runs = Comparison({"a": a, "b": b, "c": c})
    rates = {pair: rate.mean for pair, rate in runs.win_rates()["face"].items()}
    assert rates == {("a", "b"): 1.0, ("a", "c"): pytest.approx(0.5 / 3), ("b", "c"): pytest.approx(4.5 / 12)}
    apart = Comparison({"a": a, "d": faces(0.8, 2)})
    assert apart.win_rates() == apart.plain()["win_rates"] == {}
    assert apart.differences()["reward face"]["d"].mean == pytest.approx(-0.1)
    assert apart.notes() == ["The reward face scored no image of two runs in both: it has no win rate."]
    assert "<h2>Win rates</h2>" not in write_comparison(tmp_path, apart).read_text()


@pytest.mark.parametrize("other", [{1: 2.0, 2: 4.0, 0: 1.0}, {1: 2.0}])
def test_another_number_of_scored_prompts_is_no_error(comparison, other):
    other = dict(sorted(other.items()))
    runs = Comparison({"a": scored(comparison.runs["all"], {1: 3.0}), "b": scored(comparison.runs["half"], other)})
    assert runs.differences()["reward votes"]["b"].mean == -1.0
    assert runs.fewer() == {"reward votes": 1}


def test_a_reward_that_scored_no_prompt_in_both_gives_no_number(comparison, tmp_path):
    """By place in a list the difference would be -10, and a would win always."""
    alone = scored(comparison.runs["all"], {1: 10.0})
    for other in (scored(comparison.runs["half"], {0: 0.0, 2: 0.0}), comparison.runs["half"]):
        runs = Comparison({"a": alone, "b": other})
        note = "No prompt was scored by the reward votes in all runs: it is not compared."
        assert runs.notes() == [note]
        for table in (runs.means(), runs.differences()):
            assert "reward near" in table
            assert "reward votes" not in table
        assert runs.win_rates().keys() == runs.plain()["front"].keys() == {"near"}
        assert f"<p>{note}</p>" in write_comparison(tmp_path, runs).read_text()
    assert json.loads((tmp_path / "compare.json").read_text())["not_compared"] == [note]


def test_where_nothing_was_scored_the_page_says_so(comparison, tmp_path):
    runs = Comparison({name: attrs.evolve(comparison.runs[name], rewards={}) for name in ("all", "half")})
    text = write_comparison(tmp_path, runs).read_text()
    assert "No reward scored a picture: only diversity is compared." in text
    assert "<h2>Win rates</h2>" not in text
    assert "<h2>Paired differences to all</h2>" in text


def entry(step, rewards, prompts=PROMPTS, **settings):
    """An evaluation; None is a prompt that the reward does not apply to."""
    rows = [
        {"prompt": str(p), "rewards": {} if r is None else {"near": r}, "diversity": {"l_gmd": 0.0 if r is None else -r}}
        for p, r in zip(prompts, rewards, strict=True)
    ]
    known = [r for r in rewards if r is not None]
    mean = sum(known) / len(known)
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


def test_equal_budgets_of_a_reward_that_applies_to_some_prompts(tmp_path):
    first = recorded(tmp_path / "a", "a", 2, 5, 1.0, [entry(2, [1.0, None, 5.0])])
    second = recorded(tmp_path / "b", "b", 2, 5, 1.0, [entry(2, [None, 2.0, 4.0])])
    third = recorded(tmp_path / "c", "c", 2, 5, 1.0, [entry(2, [7.0, 7.0, 7.0])])
    (a, b, c) = at_equal_budgets([first, second, third])[0]["steps"]
    assert [run.values["reward near"].mean for run in (a, b, c)] == [5.0, 4.0, 7.0]
    assert (b.changes["reward near"].mean, c.changes["reward near"].mean) == (-1.0, 2.0)
    assert a.fewer == {"reward near": 1}
    apart = recorded(tmp_path / "d", "d", 2, 5, 1.0, [entry(2, [None, 2.0, None])])
    assert at_equal_budgets([first, apart])[0]["steps"][1].changes.keys() == {"diversity l_gmd"}


def test_a_run_without_an_evaluation_within_the_budget_is_left_out_with_a_reason(two, comparison, tmp_path):
    """Its evaluation was given on a resume, after more steps than the cheapest run has."""
    late = recorded(tmp_path / "late", "late", 9, 5, 0.5, [entry(8, [0.0] * 3), entry(9, [0.0] * 3)])
    table, notes = at_equal_budgets([*two, late])
    assert {budget: [run.run for run in runs] for budget, runs in table.items()} == {
        "steps": ["a", "b"],
        "rows": ["a", "b"],
        "seconds": ["a", "b", "late"],  # 4.5 s are the least, of which late had spent 4 at its first evaluation
    }
    assert notes == [f"late has no evaluation on these prompts within the {budget} of the cheapest run" for budget in ("steps", "rows")]
    table, notes = at_equal_budgets([two[1], late])
    assert set(table) == {"seconds"}
    assert notes[0] in write_comparison(tmp_path / "out", Comparison(dict([*comparison.runs.items()][:2])), [two[1], late]).read_text()


def test_evaluations_before_a_change_of_prompts_or_settings_do_not_count(comparison, tmp_path):
    """The second run got other prompts at step 4, where its resume evaluated it again."""
    others = [Prompt(name) for name in ("x", "y", "z")]
    first = recorded(tmp_path / "a", "a", 3, 5, 1.0, [entry(step, [0.0] * 3) for step in (0, 3)])
    second = recorded(tmp_path / "b", "b", 6, 5, 1.0, [entry(0, [9.0] * 3, others), *(entry(step, [1.0] * 3) for step in (4, 6))])
    assert second.within("steps", 4)["step"] == 4
    assert second.within("steps", 3) is None, "what it evaluated before was on other prompts"
    assert at_equal_budgets([first, second])[0] == {}
    runs = Comparison({"a": comparison.runs["all"], "b": comparison.runs["half"]})
    text = write_comparison(tmp_path / "out", runs, [first, second]).read_text()
    assert text.count('r="2"') == 2, "the way there has one dot of each, without that of other prompts"
    seeds = recorded(tmp_path / "c", "c", 6, 5, 1.0, [entry(0, [9.0] * 3, seed=1), entry(6, [1.0] * 3)])
    assert seeds.within("steps", 3) is None


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
