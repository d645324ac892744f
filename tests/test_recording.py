import json
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ring import ring_loop

from diffalign.core import ConfigError, Hook, unessential
from diffalign.evaluation import HeldOutEvaluation
from diffalign.runs.console import Console
from diffalign.runs.recording import Recorder, environment


def test_metrics_have_one_whole_line_a_step(tmp_path):
    ring_loop(tmp_path, [Recorder(tmp_path, "seed: 0\n", "ring")]).run(3)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    # 6 steps, splits at 1 and 2: 1 + 1 + 3 + 9 + 9 + 9 rows for each of 2 prompts; the update replays 1 + 3
    assert {line["rows/policy/rollout"] for line in lines} == {64}
    assert {line["rows/policy/update"] for line in lines} == {8}
    assert {line["rows/reference/update"] for line in lines} == {8}
    assert {line["calls/policy/rollout"] for line in lines} == {6}
    assert {"reward", "reward/rewarded", "diversity/l_gmd", "contract/deviation", "grad_norm/policy", "seconds/update"} <= lines[0].keys()
    assert (tmp_path / "config.yaml").read_text() == "seed: 0\n"
    assert json.loads((tmp_path / "environment.json").read_text())["packages"]["torch"] == environment()["packages"]["torch"]


def test_the_environment_says_how_it_computes(tmp_path, monkeypatch):
    monkeypatch.setattr("diffalign.threads.os.sched_getaffinity", lambda process: {3, 5, 7})
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        loop = ring_loop(tmp_path, [Recorder(tmp_path, "", "ring")])
        loop.run(1)
        said = json.loads((tmp_path / "environment.json").read_text())
        assert (said["threads"], said["usable_cpus"]) == (torch.get_num_threads(), 3)
        assert said["attention_kernels"] == ["flash", "efficient", "math"]
        assert said["tf32"] == {"products": False, "convolutions": True}
        assert said["attention"] is None  # no pipeline
        monkeypatch.setattr("diffalign.runs.recording.pipeline_policy", lambda policy: SimpleNamespace(attention="native", adapters=()))
        loop.hooks[0].start(loop, 0, 1)
        assert json.loads((tmp_path / "environment.json").read_text())["attention"] == "native"
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def test_a_resumed_run_drops_the_lines_that_it_repeats(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"step": 3, "rew')
    ring_loop(tmp_path, [Recorder(tmp_path, "", "ring")]).run(4, start=2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert "reward" in lines[2]


def test_a_lora_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    def half(recorder, loop, step, folder):
        folder.mkdir()
        (folder / "weights").write_text(f"of step {step}" if step < 3 else "ha")
        if step == 3:
            raise OSError("disk full")

    monkeypatch.setattr(Recorder, "_export", half)
    ring_loop(tmp_path, [Recorder(tmp_path, "", "ring")]).run(2)
    assert (tmp_path / "lora" / "weights").read_text() == "of step 2"
    with pytest.raises(OSError, match="disk full"):
        ring_loop(tmp_path, [Recorder(tmp_path, "", "ring")]).run(3, start=2)
    assert (tmp_path / "lora" / "weights").read_text() == "of step 2"
    assert not [*tmp_path.glob("*.tmp")]


def test_no_report_after_an_error(tmp_path):
    loop = ring_loop(tmp_path, [Recorder(tmp_path, "", "ring")])
    for hook in loop.hooks:
        hook.start(loop, 0, 1)
        hook.stop(loop, 0, RuntimeError("broken"))
    assert not (tmp_path / "report.html").exists()


@pytest.fixture(autouse=True)
def nothing_said_yet():
    unessential.say_once.cache_clear()


def test_a_machine_without_git_trains(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment()["commit"] is None
    ring_loop(tmp_path, [Recorder(tmp_path, "", "ring")]).run(1)
    assert (tmp_path / "report.html").exists()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_that_of_the_package_and_of_no_repository_around_it(tmp_path):
    from diffalign.runs.recording import _commit

    file = tmp_path / "module.py"
    file.write_text("")
    assert _commit(file) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    assert _commit(file) is None, "somebody's repository in which the package is installed"
    subprocess.run([*git, "add", "module.py"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "y"], check=True)
    assert len(_commit(file)) == 40


def adapted(policy):
    return SimpleNamespace(attention=None, adapters=("x",))


def test_what_is_written_at_the_end_is_tried_before_the_first_step(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr("diffalign.runs.recording.pipeline_policy", adapted)
    monkeypatch.setattr("diffalign.runs.recording.export", lambda policy, folder, form, card: (folder.mkdir(), written.append(folder.name)))
    ring_loop(tmp_path, [Recorder(tmp_path, "", "ring")]).run(1)
    assert written == ["lora.tmp", "lora.tmp"], "at the end it is named when it is complete"
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["lora"]

    def refuse(*arguments):
        raise ValueError("no such layer")

    monkeypatch.setattr("diffalign.runs.recording.export", refuse)
    with pytest.raises(ValueError, match="no such layer"):
        ring_loop(tmp_path / "other", [Recorder(tmp_path / "other", "", "ring")]).run(2)
    assert (tmp_path / "other" / "metrics.jsonl").read_text() == ""


def test_a_report_that_cannot_be_made_costs_no_run_and_is_said_once(tmp_path, capsys):
    ring_loop(tmp_path, [Recorder(tmp_path, "seed: [", "ring")]).run(2)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert capsys.readouterr().err.count("report.html cannot be written: ParserError") == 1
    assert not (tmp_path / "report.html").exists()


def test_pictures_that_cannot_be_drawn_cost_no_run(tmp_path, monkeypatch, capsys):
    def no_font(size):
        raise OSError("no fonts here")

    monkeypatch.setattr("PIL.ImageFont.load_default", no_font)
    (tmp_path / "held-out.txt").write_text("one\ntwo\n")
    held_out = HeldOutEvaluation(str(tmp_path / "held-out.txt"), samples=2, steps=3)
    ring_loop(tmp_path, [Recorder(tmp_path, "", "ring"), held_out]).run(1)
    assert len(json.loads((tmp_path / "evaluation.json").read_text())) == 2
    assert capsys.readouterr().err.count("no fonts here") == 1


def test_a_terminal_that_has_gone_costs_no_run(tmp_path, monkeypatch):
    def gone(*arguments, **options):
        raise BrokenPipeError

    console = Console()
    monkeypatch.setattr(console._terminal, "print", gone)
    monkeypatch.setattr("sys.stderr", SimpleNamespace(write=gone, flush=gone, isatty=lambda: False))
    ring_loop(tmp_path, [Recorder(tmp_path, "", "ring"), console]).run(2)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_hook_may_add_metrics_that_are_numbers(tmp_path):
    class Adds(Hook):
        def __init__(self, value):
            self.value = value

        def step(self, loop, report):
            report.metrics["mine"] = self.value

    for value in (torch.tensor(0.25), np.float32(0.25), 0.25):
        ring_loop(tmp_path, [Adds(value), Recorder(tmp_path, "", "ring")]).run(1)
        assert json.loads((tmp_path / "metrics.jsonl").read_text())["mine"] == 0.25
    for value, shown in ((torch.zeros(2), "Tensor tensor"), ("good", "str 'good'")):
        with pytest.raises(ConfigError, match=f"metric 'mine' must be one number; a hook wrote {shown}"):
            ring_loop(tmp_path, [Adds(value), Recorder(tmp_path, "", "ring")]).run(1)
