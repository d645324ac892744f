import pytest
from rich.console import Console as Terminal
from ring import ring_loop

from diffalign.evaluation import HeldOutEvaluation
from diffalign.runs.console import Console, seconds_left


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
