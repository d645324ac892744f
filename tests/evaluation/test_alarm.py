"""Planted hacks are caught within a fifth of the run, healthy runs stay quiet, and the alarm does what it says."""

import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attrs
import pytest
import torch
from painted import contrast, legible, likes_loud, likes_red, meant, painted_loop
from ring import rewarded, ring_loop

from diffalign.cli import main
from diffalign.core import Aggregation, Interrupted, Partial, Progress, RewardError, RunningScale, StandardizedSum
from diffalign.evaluation import Features, HackingAlarm, vendi_score
from diffalign.evaluation.reactions import Temper, Tempered
from diffalign.evaluation.watch import Series
from diffalign.runs.recording import Recorder

JUDGES = {"legible": legible, "contrast": contrast}


@pytest.mark.parametrize("hack", [likes_red, likes_loud])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_planted_hack_is_caught_within_a_fifth_of_the_run(hack, seed, capsys, tmp_path):
    hook, total = HackingAlarm(JUDGES, images=72, action="stop"), 200
    recorder = Recorder(tmp_path, "", "hacked")
    with pytest.raises(Interrupted):
        painted_loop(hack, [hook, recorder], seed, folder=tmp_path).run(total)
    first = hook.alarms[0]
    assert first.step <= total / 5
    assert first.kind in JUDGES
    said = capsys.readouterr().err
    assert f"HACKING ALARM, step {first.step} of 200: the trained reward rose from" in said
    assert f"while the held-out reward {first.kind!r} fell from" in said
    # every hook has seen the last step, and the report warns
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == first.step
    assert f"step {first.step} of 200: the trained reward rose from" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("seed", range(5))
def test_no_alarm_rings_in_a_healthy_run(seed, tmp_path):
    hook = HackingAlarm(JUDGES, images=72)
    painted_loop(meant, [hook], seed, rate=1e-2, folder=tmp_path).run(100)
    assert hook.alarms == []
    lines = [json.loads(line) for line in (tmp_path / "watch.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(100))
    first, last = (sum(line["held_out"]["legible"] for line in some) / 20 for some in (lines[:20], lines[-20:]))
    assert last > first + 0.03, "it did learn"
    assert json.loads((tmp_path / "alarms.json").read_text()) == []


def test_servers_and_prompts_of_held_out_rewards_are_looked_at_before_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    gone = "--hooks=[{class_path: HackingAlarm, init_args: {rewards: {far: {class_path: RemoteReward, init_args: {url: 'http://127.0.0.1:9'}}}}}]"
    assert main(["check", "digits_tmpo", "--policy.device", "cpu", gone]) == 2
    assert "127.0.0.1:9" in capsys.readouterr().err
    needy = "--hooks=[{class_path: HackingAlarm, init_args: {rewards: {text: OCR}}}]"
    assert main(["check", "digits_tmpo", "--policy.device", "cpu", needy]) == 2
    assert "HackingAlarm.rewards: OCR needs the text that an image should show: prompt 'a thick digit' has no" in capsys.readouterr().err


def test_held_out_rewards_see_the_samples_with_their_prompts():
    seen = []

    def judge(images, prompts):
        seen.append((images, [str(prompt) for prompt in prompts]))
        return images.flatten(1).mean(dim=1)

    hook = HackingAlarm({"judge": judge}, images=6)
    ring = ring_loop(hooks=[hook])
    report = ring.step(ring.prompts.draw(0, 2), Progress(0, 4))
    hook.step(ring, report)
    images, prompts = seen[0]
    forest = report.batch.trajectories
    index = [0, 3, 7, 10, 14, 17]  # of 18 leaves, evenly: three of each prompt
    assert torch.equal(images, ring.objective.policy.decode(forest.samples[index]))
    assert prompts == [str(forest.condition.prompts[i]) for i in forest.group[index].tolist()]
    scores = images.flatten(1).mean(dim=1).double()
    by_prompt = scores.view(2, 3).mean(dim=1)
    (line,) = hook._watched
    assert line["held_out"]["judge"] == pytest.approx(scores.mean().item())
    assert line["spread"]["judge"] == pytest.approx(scores.std(unbiased=False).item(), rel=1e-4)
    assert line["errors"]["judge"] == pytest.approx(by_prompt.std().item() / 2**0.5, rel=1e-4), "the error of a mean of two prompts"
    assert line["groups"] == {"judge": 2}


def test_held_out_rewards_may_apply_to_some_pictures_alone():
    def bright(images, prompts):
        return images.flatten(1).mean(dim=1)

    def second(images, prompts):
        """The same, where the prompt is the second."""
        return Partial(bright(images, prompts), torch.tensor([str(prompt) == asked for prompt in prompts]))

    def never(images, prompts):
        return Partial(torch.zeros(len(images)), torch.zeros(len(images), dtype=torch.bool))

    hook = HackingAlarm({"bright": bright, "second": second, "never": never}, images=6)
    ring = ring_loop(hooks=[hook])
    report = ring.step(ring.prompts.draw(0, 2), Progress(0, 4))
    asked = str(report.batch.trajectories.condition.prompts[1])
    hook.step(ring, report)
    (line,) = hook._watched
    forest = report.batch.trajectories
    scores = bright(ring.objective.policy.decode(forest.samples[[10, 14, 17]]), None).double()
    assert set(line["held_out"]) == set(line["errors"]) == set(line["spread"]) == {"bright", "second"}
    assert line["held_out"]["second"] == pytest.approx(scores.mean().item())
    assert line["groups"] == {"bright": 2, "second": 1}
    assert Series.held_out([line], "second").variances == [], "one prompt says nothing of the error"


def test_a_step_without_a_rewarded_sample_is_not_watched():
    hook = HackingAlarm({"judge": Falling(6)})
    ring = ring_loop(hooks=[hook])
    ring._rewards = {"nobody": lambda images, prompts: Partial(torch.zeros(len(images)), torch.zeros(len(images), dtype=torch.bool))}
    ring.reward = 0.25
    report = ring.step(ring.prompts.draw(0, 2), Progress(0, 4))
    hook.step(ring, report)
    assert not {"reward", "reward/group_std"} & set(report.metrics)
    assert ring.reward == 0.25, "what is known of the reward stays"
    assert hook._watched == []
    assert hook.rewards["judge"].calls == 0


@attrs.define(eq=False)
class Falling:
    """A judge whose scores fall by themselves from a call on."""

    start: int
    calls: int = 0

    def __call__(self, images, prompts):
        self.calls += 1
        noise = 0.01 * (-1) ** self.calls
        return torch.full((len(images),), 1.0 + noise - 0.5 * max(0, self.calls - self.start)) + torch.linspace(0, 0.1, len(images))


@attrs.define(eq=False)
class Rising:
    """The trained reward of the ring, and a rise."""

    calls: int = 0

    def __call__(self, images, prompts):
        self.calls += 1
        return rewarded(images, prompts) + self.calls


def test_tempering_weakens_the_reward_and_survives_a_resume(tmp_path):
    hook = HackingAlarm({"judge": Falling(6)}, action="temper", window=3, factor=0.5)
    loop = ring_loop(tmp_path, [hook])
    loop._rewards = {"rising": Rising()}
    inner = loop.aggregation
    loop.run(12)
    assert isinstance(loop.aggregation, Tempered)
    rung = [alarm.step for alarm in hook.alarms]
    assert len(rung) == 1, "two windows pass before it acts again"
    parts, group = {"rising": torch.tensor([1.0, 2.0, 3.0])}, torch.zeros(3, dtype=torch.long)
    assert torch.equal(loop.aggregation(parts, group), 0.5 * inner(parts, group))
    assert loop.aggregation.weights == inner.weights

    again = HackingAlarm({"judge": Falling(0)}, action="temper", window=3, factor=0.5)
    resumed = ring_loop(tmp_path, [again])
    resumed.run(13, start=12)
    assert isinstance(resumed.aggregation, Tempered)
    assert [alarm.step for alarm in again.alarms] == rung
    assert len((tmp_path / "watch.jsonl").read_text().splitlines()) == 13


@pytest.mark.parametrize("given", [StandardizedSum(), Tempered(StandardizedSum(), 0.25)])
def test_a_loop_that_goes_on_as_the_same_object_is_tempered_once(tmp_path, given):
    hook = HackingAlarm({"judge": Falling(6)}, action="temper", window=3, factor=0.5)
    loop = ring_loop(hooks=[hook])
    loop.aggregation = given
    loop._rewards = {"rising": Rising()}
    loop.run(12, folder=tmp_path)
    rung = [alarm.step for alarm in hook.alarms]
    assert len(rung) == 1
    loop.run(13, folder=tmp_path, resume=True)
    assert [alarm.step for alarm in hook.alarms] == rung
    assert isinstance(loop.aggregation, Tempered)
    assert (loop.aggregation.aggregation, loop.aggregation.factor) == (given, 0.5)
    hook.start(loop, rung[0] - 1, 12)  # from a checkpoint before the alarm
    assert loop.aggregation is given


def test_a_loop_without_a_folder_stays_tempered_until_it_begins_anew():
    hook = HackingAlarm(action="temper")
    loop = ring_loop(hooks=[hook])
    given = loop.aggregation
    Temper(0.5).act(loop)
    hook.start(loop, 1, 2)
    assert isinstance(loop.aggregation, Tempered)
    hook.start(loop, 0, 2)
    assert loop.aggregation is given


def test_an_alarm_rings_once_and_resume_after_a_stop_goes_on(tmp_path):
    hook = HackingAlarm({"judge": Falling(6)}, action="stop", window=3)
    loop = ring_loop(tmp_path, [hook])
    loop._rewards = {"rising": Rising()}
    with pytest.raises(Interrupted):
        loop.run(20)
    stopped = hook.alarms[0].step
    resumed = ring_loop(tmp_path, [hook])
    resumed._rewards = {"rising": Rising(stopped)}
    resumed.run(20, start=stopped)
    assert [alarm.kind for alarm in hook.alarms] == ["judge"]


def test_a_full_disk_takes_nothing_from_the_series(tmp_path, monkeypatch):
    ring_loop(tmp_path, [HackingAlarm()]).run(4)
    before = (tmp_path / "watch.jsonl").read_text()

    def full(path, text, encoding=None):
        path.open("w", encoding=encoding).close()  # the old content is gone when the disk says that it is full
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left on device"):
        ring_loop(tmp_path, [HackingAlarm()]).run(5, start=4)
    assert (tmp_path / "watch.jsonl").read_text() == before


def test_a_stop_in_a_thread_waits_for_the_other_hooks(tmp_path):
    hook = HackingAlarm({"judge": Falling(6)}, action="stop", window=3)
    recorder = Recorder(tmp_path, "", "ring")
    loop = ring_loop(tmp_path, [hook, recorder])
    loop._rewards = {"rising": Rising()}
    with ThreadPoolExecutor(1) as pool, pytest.raises(Interrupted):
        pool.submit(loop.run, 20).result()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == hook.alarms[0].step < 20


def test_a_run_that_begins_anew_forgets_old_alarms(tmp_path):
    (tmp_path / "alarms.json").write_text('[{"step": 1, "kind": "judge", "message": "old", "action": "warn"}]')
    hook = HackingAlarm()
    ring_loop(tmp_path, [hook]).run(1)
    assert hook.alarms == []
    assert json.loads((tmp_path / "alarms.json").read_text()) == []
    (tmp_path / "alarms.json").write_text("[]")
    ring_loop(tmp_path, [Recorder(tmp_path, "", "ring")]).run(1)
    assert not (tmp_path / "alarms.json").exists()


@pytest.mark.parametrize("alarm_first", [True, False])
def test_the_recorder_forgets_the_series_of_an_earlier_run_and_keeps_that_of_this_one(tmp_path, alarm_first):
    for name in ("watch.jsonl", "alarms.json"):
        (tmp_path / name).write_text("of another run")
    hooks = [HackingAlarm(), Recorder(tmp_path, "", "ring")]
    ring_loop(tmp_path, hooks if alarm_first else hooks[::-1]).run(2)
    assert [json.loads(line)["step"] for line in (tmp_path / "watch.jsonl").read_text().splitlines()] == [0, 1]
    assert json.loads((tmp_path / "alarms.json").read_text()) == []


def test_a_collapse_is_an_alarm_without_any_judge():
    hook, loop = HackingAlarm(window=3), ring_loop()
    report = loop.step(loop.prompts.draw(0, 2), Progress(0, 30))
    hook.start(loop, 0, 30)
    for step, spread in enumerate([0.3, 0.31, 0.29, 0.3, 0.1, -0.3, -0.8, -0.9, -0.8, -0.9, -0.8, -0.9, -0.8]):
        metrics = {"reward": 0.1 * step, "diversity/l_gmd": spread}
        hook.step(loop, attrs.evolve(report, step=step, metrics=metrics))
    assert [alarm.kind for alarm in hook.alarms] == ["diversity"]
    assert "diversity (L-GMD) fell from 0.260 to" in hook.alarms[0].message


class Places(Features):
    """Where a sample lies, and later the same direction for all."""

    collapsed, shift = False, 0.0

    def __call__(self, images):
        places = images.flatten(1)
        return torch.ones_like(places) if self.collapsed else places - places.mean(dim=0) + self.shift


def test_diversity_of_features_is_the_vendi_score_of_each_prompts_pictures():
    hook, loop = HackingAlarm(features=Places(), images=9), ring_loop()
    prompts = loop.prompts.draw(0, 2)
    report = loop.step([*prompts, prompts[0]], Progress(0, 30))
    hook.start(loop, 0, 30)
    hook.step(loop, report)
    forest = report.batch.trajectories
    index = torch.linspace(0, len(forest.leaves) - 1, 9).round().long()
    pictures = Places()(loop.objective.policy.decode(forest.samples[index]))
    first = forest.group[index] != 1  # two groups of one prompt are one set
    expected = torch.stack([vendi_score(pictures[first]), vendi_score(pictures[~first])]).log().mean()
    assert hook._watched[0]["diversity"] == pytest.approx(float(expected), rel=1e-6)
    assert hook._watched[0]["held_out"] == {}


def test_a_collapse_of_features_is_told_by_their_name():
    places, loop = Places(), ring_loop()
    hook = HackingAlarm(features=places, window=3, diversity_fall=0.3)
    report = loop.step(loop.prompts.draw(0, 2), Progress(0, 30))
    hook.start(loop, 0, 30)
    for step in range(24):
        places.collapsed, places.shift = step >= 7, 0.005 * (-1) ** step
        hook.step(loop, attrs.evolve(report, step=step, metrics={"reward": 0.1 * step, "diversity/l_gmd": 0.3}))
    assert [alarm.kind for alarm in hook.alarms] == ["diversity"]
    assert "diversity (ln Vendi) fell from" in hook.alarms[0].message


def test_a_tempered_aggregation_passes_its_state_on():
    class Running(Aggregation):
        kept = 0

        def __call__(self, parts, group):
            return parts["a"]

        def state(self):
            return {"kept": self.kept}

        def restore(self, state):
            self.kept = state["kept"]

    inner = Running()
    outer = Tempered(inner, 0.5)
    outer.restore({"kept": 3})
    assert (inner.kept, outer.state()) == (3, {"kept": 3})
    assert Tempered(StandardizedSum(), 0.5).state() == {}


def test_a_tempered_running_scale_goes_on_observing():
    tempered, plain = ring_loop(), ring_loop()
    for loop in (tempered, plain):
        loop.aggregation = RunningScale()
        loop.advance(1)
    Temper(0.5).act(tempered)
    for loop in (tempered, plain):  # from equal weights, so that the scores are equal
        loop.advance(2, 1)
    assert isinstance(tempered.aggregation, Tempered)
    assert tempered.aggregation.state() == plain.aggregation.state()


def test_a_judge_that_fails_is_named():
    def broken(images, prompts):
        raise ValueError("no weights")

    with pytest.raises(RewardError, match=r"'judge' raised ValueError.*no weights"):
        ring_loop(hooks=[HackingAlarm({"judge": broken})]).run(1)


def test_a_reward_that_is_trained_on_is_no_judge():
    with pytest.raises(ValueError, match=r"HackingAlarm\.rewards must not be trained on; 'rewarded'"):
        ring_loop(hooks=[HackingAlarm({"rewarded": rewarded})]).run(1)
