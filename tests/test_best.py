"""Which weights of a run stay as the best, and that a run that stops and goes on keeps the same."""

import json
import os
import shutil
import signal

import attrs
import pytest
import torch
from ring import rewarded, ring_loop

from diffalign.core import Hook, Prompt, Raw
from diffalign.evaluation import Evaluation, HeldOutEvaluation, held_out
from diffalign.runs.best import Score, evaluated, held_out_score, keep, value_to_beat
from diffalign.runs.checkpoints import Checkpoints, load, read_manifest

HELD_OUT = [9.0, 0.2, 0.4, 0.8, 0.3, 0.7, 0.6]
"""After 0, 1, ... steps; before training is no checkpoint."""


class Rising(Hook):
    """A training reward that would take the last."""

    def __init__(self, rewards=None):
        self.rewards = rewards

    def step(self, loop, report):
        report.metrics["reward"] = float(report.step) if self.rewards is None else self.rewards[report.step]


class StopAt(Hook):
    def __init__(self, step, how):
        self.at, self.how = step, how

    def step(self, loop, report):
        if report.step + 1 == self.at:
            self.how()


def crash():
    raise RuntimeError("the machine is gone")


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def prompts(tmp_path, monkeypatch):
    """Evaluations that give the numbers above."""

    def evaluate(policy, prompts, rewards, *, step, samples, steps, seed, **options):
        scores = {name: torch.full((len(prompts), samples), HELD_OUT[step]) for name in rewards}
        settings = {"samples": samples, "steps": 28 if steps is None else steps, "seed": seed}
        return Evaluation(step, tuple(prompts), scores, {"l_gmd": torch.zeros(len(prompts))}, {}, torch.empty(0), settings)

    monkeypatch.setattr(held_out, "evaluate", evaluate)
    file = tmp_path / "held_out.txt"
    file.write_text("over there\n")
    return file


def judged(folder, prompts, *others, every=1, checkpoint_every=2, samples=2, **settings):
    evaluation = HeldOutEvaluation(str(prompts), every=every, samples=samples)
    hooks = [evaluation, Rising(), Checkpoints(folder, checkpoint_every, keep=1), *others]
    return ring_loop(folder, hooks, **settings)


def resumed(loop, total):
    checkpoints = next(hook for hook in loop.hooks if isinstance(hook, Checkpoints))
    loop.run(total, checkpoints.restore(loop))


def best(folder):
    manifest = read_manifest(folder / "best")
    return {name: manifest[name] for name in ("step", "score", "measure", "files")}


def test_the_held_out_reward_decides_also_between_checkpoints(tmp_path, prompts):
    loop = judged(tmp_path, prompts)
    loop.run(6)
    assert best(tmp_path)["step"] == 3
    assert best(tmp_path)["score"] == pytest.approx(0.8)
    assert best(tmp_path)["measure"].startswith("held-out reward on 1 prompts ")
    assert best(tmp_path)["measure"].endswith(", samples 2, steps 28, seed 0")
    expected, again = ring_loop(), ring_loop()
    expected.run(3)
    assert load(again, tmp_path / "best") == 3
    for mine, its in zip(again.objective.policy.parameters(), expected.objective.policy.parameters(), strict=True):
        assert torch.equal(mine, its)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-000006"]


def test_where_both_fall_together_the_checkpoint_itself_is_kept(tmp_path, prompts):
    judged(tmp_path, prompts, checkpoint_every=3).run(4)
    kept = json.loads((tmp_path / "best" / "manifest.json").read_text())
    assert (kept["step"], kept["score"]) == (3, pytest.approx(0.8))
    assert kept["rewards"] == [0.0, 1.0, 2.0]


def test_the_last_evaluation_comes_after_the_last_checkpoint_and_counts(tmp_path, prompts):
    judged(tmp_path, prompts, checkpoint_every=3).run(3)
    assert best(tmp_path)["step"] == 3


def test_only_rewards_that_are_trained_on_count_with_their_weights(tmp_path, prompts):
    loop = judged(tmp_path, prompts, every=2)
    loop.aggregation = Raw({"rewarded": 0.5})
    loop.hooks[0].rewards = {"beside": lambda images, prompts: images[:, 0, 0, 0]}
    loop.run(3)
    assert best(tmp_path)["score"] == pytest.approx(0.4)
    assert best(tmp_path)["step"] == 3


def scores(loop, rewards, scored=None, prompts=("a", "b", "c", "d")):
    """Score of an evaluation: reward -> mean of each prompt that it scores."""
    values = {name: torch.tensor(means)[:, None].expand(-1, 2) for name, means in rewards.items()}
    settings = {"samples": 2, "steps": 4, "seed": 0}
    result = Evaluation(1, tuple(map(Prompt, prompts)), values, {}, {}, torch.empty(0), settings, True, scored or {})
    loop.evaluations[:] = [result]
    return held_out_score(loop, 1)


def test_to_score_fewer_prompts_is_no_gain_for_a_negative_reward():
    """Divided by all prompts, one prompt of four would have -0.25, more than -0.5."""
    loop = ring_loop()
    some = {"rewarded": torch.tensor([False, True, False, False])}
    assert scores(loop, {"rewarded": [-0.5] * 4}).value == pytest.approx(-0.5)
    assert scores(loop, {"rewarded": [-1.0]}, some).value == pytest.approx(-1.0)
    assert scores(loop, {"rewarded": [-1.0]}, some).measure == scores(loop, {"rewarded": [-0.5] * 4}).measure


def test_without_a_score_there_is_no_value_and_without_one_reward_it_is_another_measure():
    """Nothing, as 0, would be more than a negative reward."""
    loop = ring_loop()
    assert scores(loop, {"beside": [1.0] * 4}) is None
    assert not evaluated(loop), "the training reward decides"
    loop = attrs.evolve(ring_loop(), aggregation=Raw({"rewarded": 0.5, "votes": 2.0}), rewards={"rewarded": rewarded, "votes": rewarded})
    both = scores(loop, {"rewarded": [1.0] * 4, "votes": [-3.0] * 4})
    alone = scores(loop, {"rewarded": [1.0] * 4})
    assert evaluated(loop)
    assert (both.value, alone.value) == (pytest.approx(-5.5), pytest.approx(0.5))
    assert alone.measure == f"{both.measure}, without votes"


def test_an_evaluation_at_the_ends_alone_leaves_it_to_the_training_reward(tmp_path, prompts):
    judged(tmp_path, prompts, every=None).run(5)
    assert best(tmp_path)["step"] == 5
    assert best(tmp_path)["measure"] == "reward of the steps before it"


@pytest.mark.parametrize("stop", [3, 4, 5])
@pytest.mark.parametrize("how", [crash, interrupt])
def test_a_run_that_goes_on_keeps_the_best_so_far(tmp_path, prompts, stop, how):
    judged(tmp_path / "whole", prompts).run(6)
    with pytest.raises((RuntimeError, KeyboardInterrupt)):
        judged(tmp_path / "run", prompts, StopAt(stop, how)).run(6)
    resumed(judged(tmp_path / "run", prompts), 6)
    assert best(tmp_path / "run") == best(tmp_path / "whole")


def test_a_crash_between_a_checkpoint_and_the_best_loses_nothing(tmp_path, prompts):
    judged(tmp_path, prompts, checkpoint_every=3).run(6)
    expected = best(tmp_path)
    with pytest.raises(RuntimeError):
        judged(tmp_path / "again", prompts, StopAt(3, crash), checkpoint_every=3).run(6)
    shutil.rmtree(tmp_path / "again" / "best")
    resumed(judged(tmp_path / "again", prompts, checkpoint_every=3), 6)
    assert best(tmp_path / "again") == expected


def test_another_measure_begins_anew(tmp_path, prompts):
    with pytest.raises(RuntimeError):
        judged(tmp_path, prompts, StopAt(4, crash)).run(6)
    assert best(tmp_path)["step"] == 3
    resumed(judged(tmp_path, prompts, samples=4), 6)
    assert best(tmp_path)["step"] == 5
    assert "samples 4" in best(tmp_path)["measure"]


REWARDS = [0.1, 0.2, 0.9, 0.8, 0.3, 0.4, 0.9, 0.6, 0.9]


@pytest.mark.parametrize("stop", [2, 4, 5, 7])
@pytest.mark.parametrize("how", [crash, interrupt])
def test_by_the_training_reward_a_stop_changes_nothing_either(tmp_path, stop, how):
    def run(folder, *others):
        return ring_loop(folder, [Rising(REWARDS), Checkpoints(folder, every=3, keep=1), *others])

    run(tmp_path / "whole").run(9)
    assert (best(tmp_path / "whole")["step"], best(tmp_path / "whole")["score"]) == (9, pytest.approx(0.8))
    with pytest.raises((RuntimeError, KeyboardInterrupt)):
        run(tmp_path / "run", StopAt(stop, how)).run(9)
    again = run(tmp_path / "run")
    if any((tmp_path / "run").glob("step-*")):
        resumed(again, 9)
    else:
        again.run(9)
    assert best(tmp_path / "run") == best(tmp_path / "whole")


def test_the_held_out_prompts_are_part_of_the_measure(tmp_path, prompts):
    judged(tmp_path / "one", prompts).run(1)
    prompts.write_text("elsewhere\n")
    judged(tmp_path / "other", prompts).run(1)
    assert best(tmp_path / "one")["measure"] != best(tmp_path / "other")["measure"]


def test_an_evaluation_that_lacks_a_reward_does_not_replace_the_best(tmp_path):
    whole, lacking = "held-out reward on 4 prompts", "held-out reward on 4 prompts, without face"

    def offer(step, score, measure):
        """What a run does at a step with such a score; True if it was kept."""
        new = tmp_path / f"step-{step:06d}"
        new.mkdir()
        (new / "manifest.json").write_text(json.dumps({"step": step, "files": {}}))
        better = score > value_to_beat(tmp_path, measure)
        if better:
            keep(new, Score(score, measure))
        return better

    assert offer(1, 0.1, lacking), "the first"
    assert not offer(2, 0.1, lacking)
    assert offer(3, 0.05, whole), "a whole one replaces one that lacks a reward"
    assert not offer(4, 9.0, lacking)
    assert offer(5, 0.06, whole)
