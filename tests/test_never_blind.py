"""A run can be looked at while it goes on and when it has ended, however it ends."""

import json
import os
import signal
from pathlib import Path

import attrs
import pytest
import torch
from PIL import Image
from ring import ring_loop

from diffalign.core import AlignmentLoop, Hook, Interrupted, Partial, Raw, RunningScale
from diffalign.core.interrupt import stop_between_steps
from diffalign.core.report import is_even
from diffalign.evaluation import evaluate, write_report
from diffalign.objectives import EffectiveSamples, KLBudget, SoftmaxTB, TrajectoryDistributionMatching
from diffalign.policies import TDMPolicy
from diffalign.prompts import Mixture, Source
from diffalign.runs import pictures
from diffalign.runs.checkpoints import Checkpoints, complete_checkpoints, load
from diffalign.runs.console import UNKNOWN, Console
from diffalign.runs.pictures import FirstAndLast
from diffalign.runs.recording import Recorder
from diffalign.runs.signs import Signs
from diffalign.samplers import ChainSampler, DeterministicSampler
from diffalign.testing import TinyPolicy, channel_reward


def weights(loop):
    return [parameter.detach().clone() for parameter in loop.objective.policy.parameters()]


# --- pictures


def test_the_first_and_the_last_step_are_drawn_from_equal_noise(tmp_path: Path) -> None:
    loop = ring_loop(tmp_path, [FirstAndLast(tmp_path), Recorder(tmp_path, "", "mine")])
    before = ring_loop(tmp_path / "plain")
    before.run(2)
    loop.run(2)
    assert all(torch.equal(mine, other) for mine, other in zip(weights(loop), weights(before), strict=True))  # looking changes nothing
    files = sorted((tmp_path / "images").glob("drawn-*.png"))
    assert [file.name for file in files] == ["drawn-000000.png", "drawn-000002.png"]
    assert Image.open(files[0]).size == Image.open(files[1]).size
    assert "Before and after" in (tmp_path / "report.html").read_text()
    again = ring_loop(tmp_path / "again", [FirstAndLast(tmp_path / "again")])
    again.run(1)
    assert (tmp_path / "again" / "images" / "drawn-000000.png").read_bytes() == files[0].read_bytes()


def test_pictures_are_drawn_by_the_processes_of_the_run_in_step(tmp_path: Path, monkeypatch) -> None:
    given = []

    def noted(*arguments, **options):
        given.append(options)
        return evaluate(*arguments, **options)

    monkeypatch.setattr(pictures, "evaluate", noted)
    loop = ring_loop(tmp_path, [FirstAndLast(tmp_path)])
    loop.advance(1)
    assert len(given) == 2
    assert all((options["devices"], options["lockstep"]) == (loop.devices, loop.lockstep) for options in given)


def test_a_picture_that_cannot_be_written_ends_no_run(tmp_path: Path, capsys) -> None:
    (tmp_path / "images").write_text("a file in the place of the folder")
    ring_loop(tmp_path, [FirstAndLast(tmp_path)]).run(1)
    assert "drawn-000000.png: FileExistsError" in capsys.readouterr().err


# --- signs


class Said:
    def __init__(self, capsys):
        self.capsys, self.hook, self.loop = capsys, Signs(), ring_loop()
        self.reports = []
        self.loop.hooks = [Keep(self.reports)]
        self.loop.run(1)
        self.hook.start(self.loop, 0, 100)
        capsys.readouterr()

    def step(self, number, factor=1.0, **metrics):
        report = self.reports[0]
        trajectories = attrs.evolve(report.batch.trajectories, latents=report.batch.trajectories.latents * factor)
        known = {**report.metrics, "reward/group_std": 0.1, **{name.replace("__", "/"): value for name, value in metrics.items()}}
        self.hook.step(
            self.loop, attrs.evolve(report, step=number, metrics=known, batch=attrs.evolve(report.batch, trajectories=trajectories))
        )
        return self.capsys.readouterr().err


class Keep(Hook):
    def __init__(self, reports):
        self.reports = reports

    def step(self, loop, report):
        self.reports.append(report)


def test_ten_steps_without_spread_are_said_once(capsys) -> None:
    said = Said(capsys)
    assert [said.step(number, reward__group_std=0.0) for number in range(9)] == [""] * 9
    assert said.step(9, reward__group_std=0.1) == ""  # one step with spread: counted anew
    texts = [said.step(10 + number, reward__group_std=0.0) for number in range(12)]
    assert [bool(text) for text in texts] == [False] * 9 + [True, False, False]
    assert texts[9].startswith("step 20: for 10 steps all samples of a prompt have had the same reward")


def said_by(capsys, steps=12, **changed) -> str:
    given = {
        "objective": SoftmaxTB(TinyPolicy()),
        "sampler": ChainSampler(4, 2),
        "prompts": ["one", "two"],
        "aggregation": Raw(),
        **changed,
    }
    AlignmentLoop(**given, prompts_per_step=1, hooks=[Signs()]).advance(steps)
    return capsys.readouterr().err


def nothing(images, prompts):
    return Partial(torch.zeros(len(images)), torch.zeros(len(images), dtype=torch.bool))


def flat(images, prompts):
    return torch.zeros(len(images))


@pytest.mark.parametrize("beta", [20.0, KLBudget(10.0), EffectiveSamples(0.6)])
@pytest.mark.parametrize("steps", [12, 100])
def test_a_constant_reward_is_said_once_whatever_the_temperature(steps, beta, capsys) -> None:
    """The objective, which is told of every step as well, says nothing of its own."""
    said = said_by(capsys, steps, rewards=flat, objective=SoftmaxTB(TinyPolicy(), beta=beta)).splitlines()
    (line,) = [line for line in said if "reward" in line]
    assert line.startswith("step 10: for 10 steps all samples of a prompt have had the same reward, so nothing is learned.")


def test_one_sample_of_a_prompt_has_no_spread_to_miss(capsys) -> None:
    def distilled(samples):
        objective = TrajectoryDistributionMatching(TDMPolicy(TinyPolicy(), steps=4))
        return said_by(capsys, rewards=flat, objective=objective, sampler=DeterministicSampler(4, samples=samples))

    assert "all samples of a prompt have had the same reward" in distilled(2)
    assert "same reward" not in distilled(1)


def test_ten_steps_without_a_score_are_said_once(capsys) -> None:
    text = said_by(capsys, rewards={"quoted": nothing})
    assert text.count("step 10: for 10 steps no reward has applied to any picture, so none is learned from. Look at what quoted asks") == 1
    assert text.count("no reward has applied") == 1
    assert "no reward has applied" not in said_by(capsys, steps=9, rewards={"quoted": nothing})
    assert "no reward has applied" not in said_by(capsys, rewards={"quoted": nothing, "flat": flat})
    logged = said_by(capsys, rewards={"quoted": nothing, "flat": flat}, aggregation=Raw({"quoted": 1.0, "flat": 0.0}))
    assert "Look at what quoted asks" in logged


def test_a_reward_that_is_silent_beside_others_is_said_once(capsys) -> None:
    """Whether or not it has a weight; `Raw` gives each 1."""
    for weights in (None, {"bright": 1.0}):
        text = said_by(capsys, rewards={"quoted": nothing, "bright": channel_reward}, aggregation=Raw(weights))
        assert text.count("step 10: for 10 steps the reward 'quoted' has applied to no picture, so it counts for nothing") == 1
        assert text.count("has applied to no picture") == 1
    assert "to no picture" not in said_by(capsys, steps=9, rewards={"quoted": nothing, "bright": channel_reward})
    assert "to no picture" not in said_by(capsys, rewards={"quoted": nothing})  # said of all together
    sources = {"one": Source(["one"], share=99.0, rewards=["bright"]), "two": Source(["two"], rewards=["quoted"])}
    assert "to no picture" not in said_by(capsys, rewards={"quoted": nothing, "bright": channel_reward}, prompts=Mixture(sources))


def test_a_spread_of_rounding_is_none(capsys) -> None:
    said = Said(capsys)
    texts = [said.step(number, reward__group_std=6e-8, reward=0.1) for number in range(10)]
    assert texts[9].startswith("step 10: for 10 steps all samples of a prompt have had the same reward")
    for reward, spread, flat in ((1000.0, 6e-4, True), (0.1, 2e-6, False), (1000.0, 2e-3, False)):
        assert is_even({"reward": reward, "reward/group_std": spread}) is flat


def test_prompts_that_need_no_reward_are_not_missed(capsys) -> None:
    def asked(share):
        sources = {"free": Source(["one"], share=99.0, rewards=[]), "asked": Source(["two"], share=share, rewards=["quoted"])}
        return said_by(capsys, rewards={"quoted": nothing}, prompts=Mixture(sources))

    assert "no reward has applied" not in asked(1.0)
    assert "no reward has applied" in asked(9_900.0)


def test_a_log_ratio_that_explodes_is_said(capsys) -> None:
    said = Said(capsys)
    asked = {"target__spread": 8.0, "log_ratio__spread": 1.0}
    assert said.step(0, log_ratio__reference=-30.0, **asked) == ""
    text = said.step(1, log_ratio__reference=-900.0, **asked)
    assert text.startswith("step 2: log_ratio/reference is -900 nats, far more than the rewards ask for (8)")
    assert "The learning rate is probably too high (" in text
    assert text.count("\n") == 1


@pytest.mark.parametrize("factor", [5.0, 0.1, float("inf")])
def test_a_destroyed_model_is_said(capsys, factor) -> None:
    said = Said(capsys)
    assert said.step(0) == ""
    assert said.step(1, factor=1.5) == ""
    assert "has probably destroyed the model" in said.step(2, factor=factor)


# --- the report


def evaluation(folder: Path, **known: object) -> str:
    entry = {
        "step": 0, "samples": 2, "steps": 2, "seed": 0, "rewards": {"even": 0.5}, "diversity": {"l_gmd": 0.1}, "across": {},
        "by_prompt": [{"prompt": "a", "rewards": {"even": 0.5}, "diversity": {"l_gmd": 0.1}}] * 2, **known,
    }  # fmt: skip
    (folder / "evaluation.json").write_text(json.dumps([entry, {**entry, "step": 2}]))
    return write_report(folder, "run").read_text()


def test_the_report_claims_of_prompts_what_is_known(tmp_path: Path) -> None:
    assert "2 prompts that were not trained on, the same noise" in evaluation(tmp_path, also_trained=0)
    assert "2 prompts, of which 1 were trained on as well, the same noise" in evaluation(tmp_path, also_trained=1)
    for unknown in ({}, {"also_trained": None}):
        page = evaluation(tmp_path, **unknown)
        assert "2 prompts, the same noise" in page
        assert "not trained on" not in page


# --- the bar


def test_the_bar_shows_no_number_that_is_not_known(monkeypatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    console, loop = Console(), ring_loop()
    console.start(loop, 0, 5)
    try:
        assert console._progress is not None
        fields = console._progress.tasks[0].fields
        assert fields == {**dict.fromkeys(("reward", "diversity", "check", "rows"), UNKNOWN), "peak": ""}
        loop.hooks = [console]
        shown = console._progress.get_renderable()
        assert shown is not None
    finally:
        console.stop(loop, 0, KeyboardInterrupt())


# --- Ctrl-C


def test_the_first_ctrl_c_answers_at_once(capfd) -> None:
    with stop_between_steps() as request:
        request.step = 12
        os.kill(os.getpid(), signal.SIGINT)
        assert capfd.readouterr().err == "finishing step 12; again: stop now, without saving that step\n"


def test_a_second_waits_while_weights_move() -> None:
    with stop_between_steps() as request:
        os.kill(os.getpid(), signal.SIGINT)
        request.hold()
        os.kill(os.getpid(), signal.SIGINT)
        request.release()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with stop_between_steps(speaks=False) as request:
        os.kill(os.getpid(), signal.SIGINT)


class Press:
    """A reward that presses Ctrl-C twice at one of its calls."""

    def __init__(self, call, inner):
        self.call, self.inner, self.calls = call, inner, 0

    def __call__(self, images, prompts):
        self.calls += 1
        if self.calls == self.call:
            torch.rand(3)
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
        return self.inner(images, prompts)


def made(folder, hooks=()):
    torch.manual_seed(0)
    loop = ring_loop(folder, hooks)
    loop.aggregation = RunningScale()  # has a state that the step under way moves
    return loop


def test_a_second_ctrl_c_keeps_the_last_finished_step_exactly(tmp_path: Path) -> None:
    whole = made(tmp_path)
    whole.run(5)
    first = made(tmp_path, [Checkpoints(tmp_path, every=100)])
    name, reward = next(iter(first._rewards.items()))
    first._rewards[name] = Press(4, reward)
    with pytest.raises(KeyboardInterrupt) as stopped:
        first.run(5)
    assert not isinstance(stopped.value, Interrupted)
    saved = complete_checkpoints(tmp_path)
    assert [path.name for path in saved] == ["step-000003"]
    second = made(tmp_path)
    assert load(second, saved[0]) == 3
    second.run(5, 3)
    assert all(torch.equal(mine, other) for mine, other in zip(weights(second), weights(whole), strict=True))


@attrs.frozen
class PressAfter(Hook):
    """Presses Ctrl-C twice after some steps, before the hooks behind it see the last of them."""

    steps: int

    def step(self, loop, report):
        if report.step + 1 == self.steps:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_second_ctrl_c_among_the_hooks_keeps_the_step_that_they_see(tmp_path: Path, steps) -> None:
    whole = made(tmp_path)
    whole.run(5)
    first = made(tmp_path, [PressAfter(steps), Checkpoints(tmp_path, every=100)])
    with pytest.raises(KeyboardInterrupt) as stopped:
        first.run(5)
    assert not isinstance(stopped.value, Interrupted)
    second = made(tmp_path)
    assert load(second, complete_checkpoints(tmp_path)[-1]) == steps
    assert second.aggregation.state() == first.aggregation.state()
    second.run(5, steps)
    assert all(torch.equal(mine, other) for mine, other in zip(weights(second), weights(whole), strict=True))


def test_a_second_ctrl_c_while_weights_move_waits_for_the_step(tmp_path: Path) -> None:
    loop = ring_loop(tmp_path, [Checkpoints(tmp_path, every=100)])
    optimizer = loop.running["policy"]
    step, calls = optimizer.step, []

    def pressed(*arguments):
        calls.append(1)
        if len(calls) == 2:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
        return step(*arguments)

    optimizer.step = pressed
    with pytest.raises(Interrupted):
        loop.run(5)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-000002"]
