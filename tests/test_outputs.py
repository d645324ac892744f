"""Where commands write: a place that cannot be written is refused before anything is built or drawn."""

import errno
import os
from pathlib import Path

import pytest
from toy import TOY

from diffalign.cli import main
from diffalign.core import ConfigError
from diffalign.runs.folder import require_writable


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A trained run in this folder, beside a file that is no folder."""
    (tmp_path / "toy.yaml").write_text(f"{TOY}total: 1\n")
    (tmp_path / "held-out.txt").write_text("one\ntwo\n")
    (tmp_path / "file").write_text("no folder")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "toy.yaml"]) == 0
    return tmp_path / "runs" / "toy"


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["sample", "runs/toy", "--prompt", "one", "--steps", "4", "--out", "file/x.png"], "--out"),
        (["evaluate", "runs/toy", "--prompts", "held-out.txt", "--out", "file"], "--out"),
        (["compare", "runs/toy", "toy.yaml", "--prompts", "held-out.txt", "--out", "file"], "--out"),
        (["export", "runs/toy", "--out", "file/x"], "--out"),
        (["bundle", "runs/toy", "--out", "file/x.zip"], "--out"),
        (["prompts", "geneval", "file/x.jsonl"], "OUT"),
    ],
)
def test_a_place_that_cannot_be_written_is_named_before_the_work(run, monkeypatch, capsys, arguments, option):
    for work in ("config.run.Run.build", "runs.trained.trained_policy", "prompts.generated", "runs.bundle.bundle"):
        monkeypatch.setattr(f"diffalign.{work}", None)  # what is called first is an error of its own
    capsys.readouterr()
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: folder file")
    assert f"must be writable; [Errno {errno.ENOTDIR}]" in said
    assert f"Give another {option}" in said


def test_a_place_where_nobody_may_look_is_no_other_error(monkeypatch):
    def closed(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "exists", closed)
    with pytest.raises(ConfigError, match=r"folder closed/x must be writable; \[Errno 13\] Permission denied.* Give another --out"):
        require_writable(Path("closed/x"), "--out")


@pytest.mark.parametrize("name", ["x.psd", "x.hdf", "x.xbm"])
def test_a_format_that_is_only_read_is_no_picture(run, capsys, name):
    assert main(["sample", "runs/toy", "--prompt", "one", "--steps", "4", "--out", name]) == 2
    assert f"--out must end in an image format such as .png; got '{name}'" in capsys.readouterr().err
