import itertools
import re

import pytest
import torch
from rich.console import Console as Terminal
from ring import ring_loop

from diffalign.core import Hook, Partial
from diffalign.evaluation import HeldOutEvaluation
from diffalign.runs.console import Console, seconds_left
from diffalign.runs.recording import Recorder


def test_plain_lines_where_there_is_no_terminal(tmp_path, capsys):
    (tmp_path / "held-out.txt").write_text("one\ntwo\n")
    hooks = [HeldOutEvaluation(str(tmp_path / "held-out.txt"), samples=3, steps=4), Console(lines=2)]
    ring_loop(tmp_path / "run", hooks).run(4)
    out = " ".join(capsys.readouterr().out.split())
    assert "SoftmaxTB: steps 0 to 4, 2 prompts a step, 1 CPU thread held-out" in out
    assert "step 2/4 reward" in out
    assert "step 3/4" not in out
    for word in ("diversity", "ratio check", "rows/s", "left"):
        assert word in out
    before, after = (result.rewards["rewarded"].mean().item() for result in hooks[0].results)
    assert f"rewarded {before:.3f} -> {after:.3f}" in out
    assert "held-out prompts (2, 3 samples each), step 0 -> step 4, change [95 % interval]:" in out
    assert "diversity (L-GMD)" in out
    assert "diversity vendi/pixels" in out
    assert "\x1b" not in out


class Deviations(Hook):
    """Notes the deviation of every step, None where the contract was not checked."""

    def __init__(self):
        self.seen = []

    def step(self, loop, report):
        self.seen.append(report.metrics.get("contract/deviation"))


def test_a_line_shows_the_last_check_of_the_contract(capsys):
    noted = Deviations()
    ring_loop(None, [noted, Console(lines=2)]).run(20)
    assert noted.seen[9] is noted.seen[19] is None, "the lines come at steps that are not checked"
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    for done, line in zip((10, 20), lines, strict=True):
        last = [number for number in noted.seen[:done] if number is not None][-1]
        assert f"ratio check {last:.0e}  " in line


def test_a_second_run_of_one_console_counts_its_own_rows(monkeypatch, capsys):
    ticks = itertools.count()
    monkeypatch.setattr("diffalign.runs.console.time.monotonic", lambda: float(next(ticks)))
    console = Console(lines=1)
    for _ in range(2):
        ring_loop(None, [console]).run(2)
    speeds = re.findall(r"(\d+) rows/s", capsys.readouterr().out)
    assert len(speeds) == 2
    assert speeds[0] == speeds[1] != "0"


def test_a_run_that_is_not_checked_shows_none(capsys):
    ring_loop(None, [Console(lines=2)], check_rows=0).run(2)
    assert capsys.readouterr().out.count("ratio check -  ") == 2


@pytest.mark.parametrize(("held_out", "shared"), [("left\nnew\n", 1), ("left\nup\n", 2), ("new\nother\n", 0)])
def test_held_out_prompts_that_are_trained_on_are_counted_once(tmp_path, capsys, held_out, shared):
    (tmp_path / "held-out.txt").write_text(held_out)
    ring_loop(None, [HeldOutEvaluation(str(tmp_path / "held-out.txt"), every=1, samples=2, steps=2), Console()]).run(2)
    out = capsys.readouterr().out
    line = f"  {shared} of these 2 prompts are trained on as well, so they say little about other prompts\n"
    assert out.count("trained on as well") == out.count(line) == (shared > 0)


class Votes:
    """Votes of 1 before training and of 3 after it, for some prompts."""

    def __init__(self, before, after):
        self.given = iter([(1.0, before), (3.0, after)])

    def __call__(self, images, prompts):
        value, known = next(self.given)
        return Partial(torch.full((len(prompts),), value), torch.tensor([str(prompt) in known for prompt in prompts]))


@pytest.mark.parametrize(
    ("before", "after", "line"),
    [
        ((), ("one",), "votes - -> 3.000 no prompt was scored in both"),
        (("two",), ("one",), "votes - -> 3.000 no prompt was scored in both"),
        (("one", "two"), ("one",), "votes (over 1 prompt) 1.000 -> 3.000 +2.000"),
        (("one", "two"), (), "diversity (L-GMD)"),
        ((), (), "diversity (L-GMD)"),
    ],
)
def test_a_reward_of_some_prompts_ends_in_a_report(tmp_path, capsys, before, after, line):
    (tmp_path / "held-out.txt").write_text("one\ntwo\n")
    held_out = HeldOutEvaluation(str(tmp_path / "held-out.txt"), samples=3, steps=4, rewards={"votes": Votes(before, after)})
    ring_loop(tmp_path / "run", [held_out, Recorder(tmp_path / "run", "", "votes"), Console()]).run(2)
    out = " ".join(capsys.readouterr().out.split())
    assert line in out
    assert (tmp_path / "run" / "report.html").exists()
    assert ("votes" in out.split("change [95 % interval]:")[1]) == ("votes" in line)


def test_evaluations_on_different_prompts_are_not_subtracted(tmp_path, capsys):
    """The first of two evaluations is on one prompt, the last of the other on two."""
    hooks = []
    for name, prompts in (("one.txt", "a\n"), ("two.txt", "b\nc\n")):
        (tmp_path / name).write_text(prompts)
        hooks.append(HeldOutEvaluation(str(tmp_path / name), samples=3, steps=4))
    ring_loop(None, [*hooks, Console()]).run(2)
    before, after = (result.rewards["rewarded"].mean().item() for result in hooks[1].results)
    out = " ".join(capsys.readouterr().out.split())
    assert "held-out prompts (2, 3 samples each), step 0 -> step 2" in out
    assert f"rewarded {before:.3f} -> {after:.3f}" in out


def test_a_live_line_on_a_terminal(tmp_path, capsys):
    hook = Console()
    hook._terminal = Terminal(force_terminal=True, width=160)
    ring_loop(tmp_path, [hook]).run(3)
    out = capsys.readouterr().out
    assert "3/3" in out
    assert "\x1b[" in out


def test_the_time_left_after_a_resume_counts_what_this_process_did():
    assert seconds_left(20.0, 0, 10, 30) == pytest.approx(40.0)
    assert seconds_left(20.0, 80, 90, 100) == pytest.approx(20.0)  # ten steps in 20 s, ten to go
    assert seconds_left(20.0, 80, 100, 100) == 0.0


def test_a_resumed_run_prints_that_time(tmp_path, capsys, monkeypatch):
    now = iter(range(0, 10_000, 10))
    monkeypatch.setattr("diffalign.runs.console.time.monotonic", lambda: float(next(now)))
    ring_loop(tmp_path, [Console(lines=100)]).run(103, start=100)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step 101/")]
    # the clock moves on by 10 s at every look: 2 looks in this step, 1 step done, 2 to go
    assert lines[0].endswith("  40 s left"), lines


def test_other_processes_are_silent(tmp_path, capsys):
    hook, loop = Console(), ring_loop(tmp_path)
    loop.devices = type("Second", (), {"rank": 1, "size": 2})()
    hook.start(loop, 0, 1)
    hook.stop(loop, 0, None)
    assert capsys.readouterr().out == ""


def test_a_resumed_run_does_not_call_its_first_weights_those_before_the_run(tmp_path, capsys):
    (tmp_path / "held.txt").write_text("a\nb\n")
    ring_loop(tmp_path, [HeldOutEvaluation(str(tmp_path / "held.txt"), samples=3, steps=4), Console()]).run(4, start=2)
    out = " ".join(capsys.readouterr().out.split())
    assert "held-out prompts at step 2: rewarded" in out
    assert "held-out prompts before" not in out
    assert "step 2 -> step 4, change [95 % interval]; this process began there, the report has the whole run:" in out


def test_evaluations_on_the_way_are_printed(tmp_path, capsys):
    (tmp_path / "held.txt").write_text("a\nb\n")
    evaluation = HeldOutEvaluation(str(tmp_path / "held.txt"), every=2, samples=3, steps=4)
    ring_loop(tmp_path, [evaluation, Console()]).run(4)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("held-out prompts at")]
    mean = evaluation.results[1].rewards["rewarded"].mean().item()
    assert [line.partition(", diversity")[0] for line in lines] == [f"held-out prompts at step 2: rewarded {mean:.3f}"]
