"""A run that is stopped in its last step keeps its weights at once; `--resume` does what is left, the last evaluation and the report."""

import json
import os
import signal
from pathlib import Path

import pytest
from ring import ring_loop

from diffalign.cli import main
from diffalign.core import Hook, Interrupted
from diffalign.evaluation import HeldOutEvaluation

RUN = """
policy: {class_path: diffalign.testing.TinyPolicy}
objective: SoftmaxTB
sampler: {class_path: ChainSampler, init_args: {steps: 3, samples: 2}}
rewards: diffalign.testing.channel_reward
prompts: [one, two]
evaluation: {prompts: held-out.txt, steps: 2, samples: 2}
prompts_per_step: 1
total: 3
hooks: [test_interrupted_end.SignalAt]
"""


class SignalAt(Hook):
    """Sends the signal by which a cluster ends a job, after the step that the file `at` names, and removes the file."""

    def step(self, loop, report):
        file = Path("at")
        if file.exists() and report.step + 1 == int(file.read_text()):
            file.unlink()
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    (tmp_path / "toy.yaml").write_text(RUN)
    (tmp_path / "held-out.txt").write_text("three\nfour\n")
    monkeypatch.chdir(tmp_path)


def measured(folder):
    entries = json.loads((Path(folder) / "evaluation.json").read_text())
    return [(entry["step"], entry["rewards"], entry["by_prompt"]) for entry in entries]


def test_what_a_signal_in_the_last_step_leaves_out_is_done_when_the_run_is_resumed(capsys):
    assert main(["train", "toy.yaml", "--folder", "whole"]) == 0
    Path("at").write_text("3")
    assert main(["train", "toy.yaml", "--folder", "cut"]) == 130
    assert "the last checkpoint is cut/step-000003" in capsys.readouterr().err
    assert [step for step, *_ in measured("cut")] == [0]
    assert not Path("cut/report.html").exists()
    assert main(["train", "toy.yaml", "--folder", "cut", "--resume"]) == 0
    assert measured("cut") == measured("whole")
    assert Path("cut/report.html").exists()
    assert len(Path("cut/metrics.jsonl").read_text().splitlines()) == 3
    capsys.readouterr()
    assert main(["train", "toy.yaml", "--folder", "cut", "--resume"]) == 0
    assert "cut has done 3 of 3 steps; nothing is left to do." in capsys.readouterr().err


def test_a_run_that_is_cut_and_then_shortened_to_where_it_stands_is_ended_too(capsys):
    Path("at").write_text("2")
    assert main(["train", "toy.yaml", "--folder", "cut"]) == 130
    assert Path("cut/report.html").exists()
    assert main(["train", "toy.yaml", "--folder", "cut", "--resume", "--new-total", "--total", "2"]) == 0
    assert [step for step, *_ in measured("cut")] == [0, 2]
    capsys.readouterr()
    assert main(["train", "toy.yaml", "--folder", "cut", "--resume", "--new-total", "--total", "1"]) == 0
    assert "cut has done 2 of 1 steps; nothing is left to do." in capsys.readouterr().err


class EndsAt(Hook):
    """As an alarm does whose action is to stop."""

    def __init__(self, step):
        self.at = step

    def step(self, loop, report):
        if report.step + 1 == self.at:
            loop.end()


def test_a_loop_that_a_hook_ends_in_its_last_step_is_evaluated_when_it_goes_on(tmp_path):
    def loop(*more):
        return ring_loop(tmp_path / "run", [HeldOutEvaluation("held-out.txt", samples=2, steps=4), *more])

    with pytest.raises(Interrupted):
        loop(EndsAt(2)).run(2, folder=tmp_path / "run")
    assert [step for step, *_ in measured("run")] == [0]
    assert not (tmp_path / "run" / "report.html").exists(), "it would say that nothing is left to do"
    loop().run(2, folder=tmp_path / "run", resume=True)
    assert [step for step, *_ in measured("run")] == [0, 2]
    assert (tmp_path / "run" / "report.html").exists()
