"""A crash at every point of the writing of a checkpoint, of the best and of the removal of an old one; and real ones, by SIGKILL."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from ring import ring_loop
from started import start

from diffalign import durable
from diffalign.core import Hook
from diffalign.runs import snapshot
from diffalign.runs.checkpoints import Checkpoints, complete_checkpoints, read_manifest


class Crash(BaseException):
    """What no part may catch, as nobody catches SIGKILL."""


class Countdown:
    """Stands before functions that touch the disk, and crashes at one of their calls."""

    def __init__(self, monkeypatch):
        self.calls, self.at = 0, None
        for owner, name in (
            (durable, "sync"),
            (snapshot, "save_file"),
            (snapshot.torch, "save"),
            (os, "link"),
            (shutil, "rmtree"),
            (Path, "rename"),
            (Path, "mkdir"),
            (Path, "write_text"),
        ):
            monkeypatch.setattr(owner, name, self._before(getattr(owner, name)))

    def _before(self, function):
        def counted(*arguments, **options):
            if self.at is not None:
                self.calls += 1
                if self.calls == self.at:
                    raise Crash
            return function(*arguments, **options)

        return counted


class Better(Hook):
    """Every step is the best so far."""

    def step(self, loop, report):
        report.metrics["reward"] = float(report.step)


def loop(folder):
    return ring_loop(folder, [Checkpoints(folder, every=1, keep=1), Better()][::-1])


@pytest.fixture(scope="module")
def whole():
    expected = ring_loop()
    expected.run(3)
    return [parameter.detach().clone() for parameter in expected.objective.policy.parameters()]


def test_a_crash_at_any_point_leaves_a_folder_that_goes_on(tmp_path, monkeypatch, whole):
    first = loop(tmp_path / "first")
    first.run(1)
    countdown = Countdown(monkeypatch)
    for at in range(1, 200):
        folder = tmp_path / f"crash-{at}"
        shutil.copytree(tmp_path / "first", folder)
        run = loop(folder)
        start = run.hooks[1].restore(run)
        countdown.calls, countdown.at = 0, at
        try:
            run.run(2, start)
        except Crash:
            countdown.at = None
        else:
            break
        again = loop(folder)
        start = again.hooks[1].restore(again)
        assert start in (1, 2), at
        again.hooks[1].start(again, start, 3)
        assert read_manifest(folder / "best")["step"] in (1, 2), at
        again.run(3, start)
        assert all(torch.equal(mine, other) for mine, other in zip(again.objective.policy.parameters(), whole, strict=True)), at
        assert {path.name for path in folder.iterdir()} <= {"step-000003", "best"}, at
        assert len(complete_checkpoints(folder)) == 1
        shutil.rmtree(folder)
    assert at > 20, "so many points were tried"


def test_a_few_kills_in_earnest():
    words = ["break", "kill", "--kills", 3, "--steps", 6]
    done = start("-m", "benchmarks", *words, environment={"PYTHONPATH": str(Path(__file__).parents[1])}, limit=200)
    assert done.returncode == 0, done.stdout + done.stderr
    tally = dict(line.split() for line in done.stdout.splitlines())
    assert (tally["kills"], tally["lost"], tally["torn"], tally["equal"]) == ("3", "0", "0", "True")
