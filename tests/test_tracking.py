"""Trackers get metrics, evaluations, pictures and the configuration, and end with the run."""

import os
import sqlite3
from pathlib import Path

import accelerate.tracking
import pytest
from accelerate.tracking import GeneralTracker
from ring import ring_loop
from started import start

from diffalign import config
from diffalign.evaluation import HeldOutEvaluation
from diffalign.runs.recording import Recorder
from diffalign.tracking import Trackers, flattened


class Listener(GeneralTracker):
    name = "listener"
    requires_logging_directory = False
    made: list = []  # noqa: RUF012

    def __init__(self, run_name):
        super().__init__()
        self.run_name, self.lines, self.images, self.config, self.finished = run_name, [], [], [], 0
        Listener.made.append(self)

    def start(self):
        pass

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.config.append(values)

    def log(self, values, step=None, **kwargs):
        self.lines.append((step, values))

    def log_images(self, values, step=None, **kwargs):
        self.images.append((step, {name: pixels.shape for name, pixels in values.items()}))

    def finish(self):
        self.finished += 1


@pytest.fixture
def listener(monkeypatch):
    """A tracker that remembers, known to accelerate by name."""
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "listener", Listener)
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", ["listener"])
    monkeypatch.setattr(Listener, "made", [])
    return Listener


def test_what_a_tracker_hears(listener, tmp_path):
    (tmp_path / "held-out.txt").write_text("one\ntwo\n")
    folder = tmp_path / "my-run"
    held_out = HeldOutEvaluation(str(tmp_path / "held-out.txt"), every=2, samples=2, steps=3)
    config = "sampler: {class_path: TreeSampler, init_args: {steps: 6, splits: [1, 2]}}\nfolder: null\n"
    ring_loop(folder, [held_out, Trackers("listener", images_every=2, pictures=3), Recorder(folder, config, "ring")]).run(3)
    (heard,) = listener.made
    assert heard.run_name == "diffalign"
    assert heard.finished == 1
    expected = {"sampler.class_path": "TreeSampler", "sampler.init_args.steps": 6, "sampler.init_args.splits.0": 1}
    # the recorder writes it after the trackers have started, and before the first step
    assert [{key: config[key] for key in expected} for config in heard.config] == [expected]
    steps = [(step, "reward" in values) for step, values in heard.lines]
    assert steps == [(0, True), (0, False), (1, True), (2, False), (2, True), (3, False)]
    assert heard.lines[1][1]["held_out/reward/rewarded"] == pytest.approx(held_out.results[0].rewards["rewarded"].mean().item())
    assert "held_out/across/cosine/pixels" in heard.lines[1][1]
    assert all(isinstance(value, float) for _, values in heard.lines for value in values.values())
    assert [step for step, shown in heard.images if "samples" in shown] == [0, 2]
    assert all(shape == (3, 1, 1, 3) for _, shown in heard.images for shape in shown.values())


def test_a_run_that_keeps_no_images_sends_none(listener, tmp_path, capsys):
    pytest.importorskip("tensorboard", reason="needs the extra: pip install diffalign[tensorboard]")
    accelerate.tracking._available_trackers.append("tensorboard")
    ring_loop(tmp_path, [Trackers(["listener", "tensorboard"], images_every=1)], keep_images=0).run(2)
    (heard,) = listener.made
    assert heard.images == []
    assert [step for step, _ in heard.lines] == [0, 1]
    assert "The run goes on without" not in capsys.readouterr().err


def test_two_evaluations_are_each_sent_once(listener, tmp_path):
    (tmp_path / "held-out.txt").write_text("one\ntwo\n")
    one, other = (HeldOutEvaluation(str(tmp_path / "held-out.txt"), every=every, samples=2, steps=3) for every in (1, 2))
    ring_loop(tmp_path / "run", [one, other, Trackers("listener", images_every=0)]).run(3)
    sent = [step for step, values in listener.made[0].lines if "reward" not in values]
    assert sent == [0, 0, 1, 2, 2, 3, 3]


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(listener, tmp_path, monkeypatch, capsys):
    class Broken(listener):
        def log(self, values, step=None, **kwargs):
            if step:
                raise ConnectionError("quota is used up")
            super().log(values, step)

    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "broken", Broken)
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", ["listener", "broken"])
    ring_loop(tmp_path, [Trackers(["broken", "listener"], images_every=0)]).run(4)
    broken, whole = listener.made
    assert ([step for step, _ in broken.lines], [step for step, _ in whole.lines]) == ([0], [0, 1, 2, 3])
    assert whole.finished == 1
    assert capsys.readouterr().err.count("tracker broken: ConnectionError: quota is used up. The run goes on without.") == 1


def test_a_tracker_that_cannot_start_stops_the_run_before_its_first_step(listener, tmp_path, monkeypatch):
    def refuse(self):
        raise ConnectionError("no account")

    monkeypatch.setattr(listener, "start", refuse)
    loop = ring_loop(tmp_path, [Trackers("listener")])
    with pytest.raises(ConnectionError, match="no account"):
        loop.run(1)
    assert loop.reward is None


def test_other_processes_are_silent(listener, tmp_path):
    hook = Trackers(["listener"])
    loop = ring_loop(tmp_path, [hook])
    loop.devices = type("Second", (), {"rank": 1, "size": 2})()
    hook.start(loop, 0, 1)
    hook.stop(loop, 0, None)
    assert listener.made == []


def test_tensorboard_files_hold_the_numbers_and_pictures(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra: pip install diffalign[tensorboard]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    ring_loop(folder, [Trackers(images_every=1, pictures=4), Recorder(folder, "total: 2\n", "ring")]).run(2)
    events = EventAccumulator(str(folder / "trackers" / "run"))
    events.Reload()
    assert [event.step for event in events.Scalars("reward")] == [0, 1]
    assert {event.step for event in events.Images("samples")} == {0, 1}


def test_names_are_checked_when_the_hook_is_built(listener):
    with pytest.raises(ValueError, match=r"Trackers\.names must be of aim, .*; got 'tensorbored'"):
        Trackers("tensorbored")
    with pytest.raises(ImportError, match=r"'wandb', whose package is not installed: pip install \"diffalign\[wandb\]\""):
        Trackers(["listener", "wandb"])
    with pytest.raises(ImportError, match="pip install aim"):
        Trackers("aim")


def test_a_configuration_becomes_one_level():
    assert flattened({"a": {"b": [1, {"c": 2.5}]}, "d": None, "e": "x"}) == {"a.b.0": 1, "a.b.1.c": 2.5, "e": "x"}


# --- trackers that are installed, each really started, without a network

OFFLINE = {"WANDB_MODE": "offline", "SWANLAB_MODE": "offline", "WANDB_SILENT": "true"}


@pytest.mark.parametrize(
    "names",
    [["wandb"], ["tensorboard", "wandb"], ["wandb", "tensorboard"], ["trackio"], ["swanlab"], ["mlflow"]],
    ids=" then ".join,
)
def test_a_tracker_that_is_installed_starts_offline(tmp_path, names):
    """In a process of its own: what one tracker leaves behind may hide what another lacks."""
    for name in names:
        pytest.importorskip(name, reason=f"needs the extra: pip install diffalign[{name}]")
    places = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db", "TRACKIO_DIR": str(tmp_path / "trackio")}
    here = Path(__file__).parent
    environment = {"PYTHONPATH": f"{here.parent}{os.pathsep}{here}", "HOME": str(tmp_path), **OFFLINE, **places}
    done = start(here / "tracked.py", "runs/seed-1", *names, folder=tmp_path, environment=environment)
    assert done.returncode == 0, done.stderr
    assert "The run goes on without" not in done.stderr
    assert f"still there {' '.join(names)}" in done.stdout
    if "wandb" in names:
        assert list(tmp_path.glob("runs/seed-1/trackers/wandb/offline-run-*/run-*.wandb"))
        assert not (tmp_path / "wandb").exists()
    if "tensorboard" in names:
        assert list(tmp_path.glob("runs/seed-1/trackers/seed-1/events*"))
    if "trackio" in names:
        assert list((tmp_path / "trackio").glob("*rings*"))
    if "mlflow" in names:
        with sqlite3.connect(tmp_path / "mlflow.db") as database:
            assert database.execute(
                "SELECT r.name FROM runs r JOIN experiments e USING (experiment_id) WHERE e.name = 'rings'"
            ).fetchall() == [("seed-1",)]
            assert {key for (key,) in database.execute("SELECT DISTINCT key FROM metrics")} >= {"reward", "seconds/rollout"}


NAMED = """
policy: {class_path: GaussianMixturePolicy, init_args: {means: [[0.0, 1.0]], scale: 1.0}}
objective: SoftmaxTB
sampler: TreeSampler
rewards: JPEGCompressibility
prompts: {class_path: Prompts, init_args: {prompts: [a]}}
hooks: [{class_path: Trackers, init_args: {names: [tensorboard]PROJECT}}]
"""


def test_a_project_is_a_configuration_and_a_run_in_it_a_folder(listener, tmp_path, monkeypatch):
    class Named(listener):
        def __init__(self, project, name="", dir=""):  # noqa: A002  as W&B calls it
            super().__init__(project)
            self.names = (project, name, Path(dir).name)

    for project, expected in (("", "dark"), (", project: mine", "mine")):
        (hook,) = config.parse_text(NAMED.replace("PROJECT", project), "dark").tree["hooks"]
        assert hook.arguments["project"] == expected
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "wandb", Named)
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", ["wandb"])
    for seed in (1, 2):
        ring_loop(tmp_path / f"seed-{seed}", [Trackers("wandb", project="dark", images_every=0)]).run(1)
    assert [made.names for made in listener.made] == [("dark", "seed-1", "trackers"), ("dark", "seed-2", "trackers")]
