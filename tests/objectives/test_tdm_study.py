"""The study of TDM-R1 and its ablations, shortened."""

import json

import pytest

from benchmarks.study import tdm_r1 as study
from diffalign import config
from diffalign.core import CPS
from diffalign.objectives import DGPO, DirectReinforcement, SurrogateReward
from diffalign.objectives.few_step import CleanerStages, FinalStage, MonteCarlo, MovingReference
from diffalign.prompts import read_prompts
from diffalign.samplers import ChainSampler
from diffalign.shapeworld import CountReward, ExactMatch


def test_every_arm_on_the_ring(tmp_path, capsys):
    file, figure = tmp_path / "study.json", tmp_path / "study.png"
    short = {"world": "ring", "steps": 12, "pretrain": 3, "distil": 2, "json": file, "figure": figure}
    study.main(**short)
    rows = json.loads(file.read_text())["ring"]
    assert list(rows) == [study.START, *(arm for arm in study.ARMS if arm not in study.ON_SHAPEWORLD)]
    distances = [seeds["0"]["distance"] for seeds in rows.values()]
    assert len(set(distances)) == len(distances)  # no arm is another one, nor the student
    assert figure.stat().st_size > 1000
    capsys.readouterr()
    study.main(**short)  # nothing is done twice
    assert "seed 0" not in capsys.readouterr().out


def test_the_baselines_on_shapeworld(tmp_path, capsys):
    file = tmp_path / "study.json"
    study.main(skip_base=True, prompts=(1, 1, 1, 1), samples=2, json=file, only=())
    rows = json.loads(file.read_text())["shapeworld, 2 samples"]
    assert list(rows) == ["base, 8 evaluations", study.START]
    assert rows[study.START]["0"]["relation"] > rows["base, 8 evaluations"]["0"]["relation"]
    assert "binding L-GMD" in capsys.readouterr().out


def test_a_search_is_measured_on_prompts_of_the_training(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(study, "evaluate", lambda policy, prompts, *args, **options: asked.extend(map(str, prompts)))
    for seed in (study.SEARCH, 0):
        with pytest.raises(AttributeError):  # nothing was measured
            study.measured(None, 4, dict.fromkeys(study.FAMILIES, 3), 2, seed)
    trained, held_out = ({str(prompt) for prompt in read_prompts(f"shapeworld/count{end}")} for end in ("", "-held-out"))
    assert len(asked) == 6
    assert set(asked[:3]) <= trained
    assert set(asked[3:]) <= held_out


def test_arms_change_what_their_names_say():
    tree = {name: config.parse("shapeworld_tdm_r1", [*study.changes(name), "--seed=1"]).tree for name in study.ARMS}
    plain = tree["TDM-R1"]
    assert plain["objective"].target is SurrogateReward
    moving = tree["moving reference"]["objective"]
    assert moving.arguments["reference"].target is MovingReference
    assert moving.arguments["group_objective"].arguments["beta"] > plain["objective"].arguments["group_objective"].arguments["beta"]
    noisy = tree["stochastic trajectories"]
    assert (noisy["sampler"].target, noisy["policy"].arguments["kernel"].target) == (ChainSampler, CPS)
    assert noisy["objective"].arguments["attribution"].target is MonteCarlo
    assert noisy["sampler"].arguments["samples"] == plain["sampler"].arguments["samples"]
    assert plain["objective"].arguments["surrogate_stages"].target is FinalStage
    assert {tree[name]["objective"].arguments["surrogate_stages"].target for name in ("all stage ends", "stochastic trajectories")} == {
        CleanerStages
    }
    assert plain["rewards"].target is ExactMatch
    learned = [name for name in tree if name not in ("DGPO alone", "TDM and direct RL")]
    reached = {name: tree[name]["objective"].arguments["reward_stages"] for name in learned}
    assert reached == dict.fromkeys(reached) | {"last stage spared": 3}
    weight = {name: tree[name]["objective"].arguments["mix"].arguments["reward"] for name in reached}
    assert weight == dict.fromkeys(reached, 8) | {"last stage spared": 12, "no reward term": 0}
    assert tree["DGPO alone"]["objective"].target is DGPO
    assert list(tree["DGPO alone"]["optimizers"]) == ["policy"]
    draws = [tree["independent draws"]["objective"].arguments[name] for name in ("stages_by", "shared", "reward_noise")]
    assert (
        draws == ["prompt", "sample", "sample"] != [plain["objective"].arguments[name] for name in ("stages_by", "shared", "reward_noise")]
    )
    assert tree["graded reward"]["rewards"].target is CountReward
    assert {name: part.target for name, part in tree["both rewards"]["rewards"].items()} == {"exact": ExactMatch, "count": CountReward}
    direct = tree["TDM and direct RL"]
    assert direct["objective"].target is DirectReinforcement
    same = ("guidance", "interval", "times", "stages", "plan")
    assert [direct["objective"].arguments[name] for name in same] == [plain["objective"].arguments[name] for name in same]
    assert direct["optimizers"] == {role: plain["optimizers"][role] for role in ("fake", "generator")}


def test_a_change_of_all_arms_reaches_each():
    changed = config.parse("shapeworld_tdm_r1", study.changes("stochastic trajectories", ["--sampler.samples=24"])).tree
    assert changed["sampler"].target is ChainSampler
    assert changed["sampler"].arguments["samples"] == 24
