"""One run at a time in a folder: who comes second is refused before anything is written; readers are never in the way."""

import errno
import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path

import attrs
import pytest
from ring import ring_loop
from toy import TOY

from diffalign import config
from diffalign.cli import main
from diffalign.core import ConfigError, Hook, SingleProcess, unessential
from diffalign.runs.checkpoints import Checkpoints, complete_checkpoints
from diffalign.runs.lock import LOCK, FolderLock

RUN = f"{TOY}total: 3\ncheckpoint_every: 1\n"


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "toy.yaml").write_text(RUN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    return tmp_path


class Locked:
    """Another process trains in a folder."""

    def __init__(self, folder: Path):
        self.file = (folder / LOCK).open("w")
        self.file.write("process 7 on elsewhere\n")
        self.file.flush()
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_run_of_any_kind_is_refused_and_nothing_is_lost(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "toy.yaml"]) == 0
    folder = workplace / "runs" / "toy"
    newest = folder / "step-000003"
    newest.rename(folder / "step-000003.tmp")  # is being written
    with Locked(folder):
        before = content(folder)
        for more in (["--resume"], ["--overwrite"]):
            capsys.readouterr()
            assert main(["train", "toy.yaml", *more]) == 2
            said = capsys.readouterr().err
            assert said == (
                "error: folder runs/toy must have one run at a time; process 7 on elsewhere trains in it now. Wait for its end, stop "
                "it, or give another folder.\n"
            )
        with pytest.raises(ConfigError, match=r"toy must have one run at a time; process 7 on elsewhere trains in it now\."):
            ring_loop().run(3, folder=folder, resume=True)
        assert main(["sample", "runs/toy", "--prompt", "one", "--n", "1", "--steps", "2", "--out", "one.png"]) == 0
        assert Checkpoints(folder).restore(config.parse(folder).build()) == 2
        assert content(folder) == before
    assert main(["train", "toy.yaml", "--resume"]) == 0
    assert newest.is_dir()
    assert not (folder / LOCK).exists()


class Second(Hook):
    """A user who comes while the run trains."""

    said: list[int] = []  # noqa: RUF012

    def step(self, loop, report):
        if report.step == 1:
            Second.said = [main(["train", "toy.yaml", more]) for more in ("--resume", "--overwrite")]
            Second.said.append(main(["sample", "runs/toy", "--prompt", "one", "--n", "1", "--steps", "2", "--out", "one.png"]))


def test_the_folder_of_a_run_that_trains_is_locked(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "toy.yaml", "--hooks", "[test_lock.Second]"]) == 0
    assert sys.modules["test_lock"].Second.said == [2, 2, 0]
    assert f"process {os.getpid()} on " in capsys.readouterr().err
    lines = [json.loads(line)["step"] for line in (workplace / "runs" / "toy" / "metrics.jsonl").read_text().splitlines()]
    assert lines == [0, 1, 2]


def test_a_run_that_has_come_and_gone_while_this_one_was_built_is_seen(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built = config.Run.build

    def slow(self: config.Run, *arguments: object) -> object:
        monkeypatch.setattr(config.Run, "build", built)
        assert main(["train", "toy.yaml"]) == 0
        return built(self, *arguments)

    monkeypatch.setattr(config.Run, "build", slow)
    assert main(["train", "toy.yaml"]) == 2
    assert "must not hold another run" in capsys.readouterr().err
    assert len((workplace / "runs" / "toy" / "metrics.jsonl").read_text().splitlines()) == 3


def test_runs_one_after_the_other_in_one_process(tmp_path: Path) -> None:
    loop = ring_loop()
    loop.run(1, folder=tmp_path)
    loop.run(2, folder=tmp_path, resume=True)
    assert ring_loop().run(3, folder=tmp_path, resume=True).steps == 3
    with pytest.raises(RuntimeError, match="a hook"):
        ring_loop(hooks=[Fails()]).run(4, folder=tmp_path, resume=True)
    assert ring_loop().run(4, folder=tmp_path, resume=True).steps == 4
    assert not (tmp_path / LOCK).exists()


class Fails(Hook):
    def step(self, loop, report):
        raise RuntimeError("a hook")


def test_two_threads_of_a_process_are_two_runs(tmp_path: Path) -> None:
    with FolderLock(tmp_path) as first, FolderLock(tmp_path) as second:
        first.take()
        first.take()  # it is held already
        with pytest.raises(ConfigError, match=f"process {os.getpid()} on "):
            second.take()
    with FolderLock(tmp_path) as third:
        third.take()


def test_a_kill_leaves_no_lock_even_if_a_child_lives_on(tmp_path: Path) -> None:
    read, write = os.pipe()
    trains = os.fork()
    if trains == 0:
        try:
            FolderLock(tmp_path).take()
            if os.fork() == 0:  # a worker that outlives it
                os.write(write, str(os.getpid()).encode())
            time.sleep(60)
        finally:
            os._exit(0)
    worker = int(os.read(read, 20))
    try:
        with FolderLock(tmp_path) as lock, pytest.raises(ConfigError, match=f"process {trains} on "):
            lock.take()
        os.kill(trains, signal.SIGKILL)
        os.waitpid(trains, 0)
        assert (tmp_path / LOCK).exists()
        with FolderLock(tmp_path) as lock:
            lock.take()
        assert not (tmp_path / LOCK).exists()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_file_that_was_removed_between_opening_and_locking_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a second process would hold the lock of a file that nobody finds."""
    flock, calls = fcntl.flock, []

    def ends(descriptor, operation):
        calls.append(operation)
        if len(calls) == 1:
            (tmp_path / LOCK).unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", ends)
    with FolderLock(tmp_path) as first, FolderLock(tmp_path) as second:
        first.take()
        assert len(calls) == 2
        with pytest.raises(ConfigError):
            second.take()


def test_a_file_system_without_locks_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unknown(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unknown)
    unessential.say_once.cache_clear()
    ring_loop().run(1, folder=tmp_path)
    ring_loop().run(2, folder=tmp_path, resume=True)
    assert capsys.readouterr().err.count("is in a place without locks (No locks available): see to it that only one run") == 1
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-000001", "step-000002"]


def test_a_folder_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    (tmp_path / LOCK).mkdir()
    with FolderLock(tmp_path) as lock, pytest.raises(ConfigError, match=r"must be writable; .*Is a directory"):
        lock.take()


@attrs.frozen
class OtherOfTwo(SingleProcess):
    rank: int = 1
    size: int = 2

    def maximum(self, values):
        return values

    def gather(self, values):
        return values.repeat(2, *[1] * (values.dim() - 1))


def test_of_several_processes_the_first_locks(tmp_path: Path) -> None:
    with FolderLock(tmp_path) as first, FolderLock(tmp_path, OtherOfTwo()) as second:
        first.take()
        second.take()
