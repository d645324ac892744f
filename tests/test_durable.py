"""Files under a full disk, a crash, and a folder that cannot be written."""

import errno
import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from diffalign import durable
from diffalign.cli import main
from diffalign.digits import DigitsPolicy
from diffalign.durable import append_line, discard, publish, write_whole
from diffalign.export import export
from diffalign.policies import FlowMatchingPolicy, LoRA
from diffalign.runs.identity import differences


def test_a_line_that_does_not_fit_is_taken_back(tmp_path, monkeypatch):
    file = tmp_path / "metrics.jsonl"
    append_line(file, '{"step": 0}')
    written = os.write
    monkeypatch.setattr(durable.os, "write", lambda descriptor, content: written(descriptor, content[:5]))
    with pytest.raises(OSError, match="No space left on device") as caught:
        append_line(file, '{"step": 1}')
    assert caught.value.errno == errno.ENOSPC
    assert file.read_text() == '{"step": 0}\n'


def test_a_file_is_the_old_or_the_new_one(tmp_path, monkeypatch):
    file = tmp_path / "config.yaml"
    write_whole(file, "old")

    def full(path):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(durable, "sync", full)
    with pytest.raises(OSError, match="full"):
        write_whole(file, "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"config.yaml": "old"}


def test_a_folder_takes_the_place_of_another(tmp_path):
    for name, content in (("old", "1"), ("new.tmp", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(content)
    publish(tmp_path / "new.tmp", tmp_path / "old")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old" / "file").read_text() == "2"
    discard(tmp_path / "old")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(params=[0o022, 0o077])
def usual(request):
    """Mode that new files get."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def modes(folder):
    return {stat.S_IMODE(file.stat().st_mode) for file in folder.rglob("*.safetensors")}


def test_weights_of_a_checkpoint_are_read_by_whom_the_umask_lets_read_them(tmp_path, usual):
    (tmp_path / "new.tmp").mkdir()
    file = tmp_path / "new.tmp" / "policy.safetensors"
    save_file({"weight": torch.zeros(1)}, file)
    file.chmod(0o600)  # as safetensors 0.8 leaves it, whatever the umask
    publish(tmp_path / "new.tmp", tmp_path / "step-000001")
    assert modes(tmp_path) == {usual}
    assert [file.name for file in (tmp_path / "step-000001").iterdir()] == ["policy.safetensors"]


@pytest.mark.parametrize("form", ["diffusers", "comfyui", "merged"])
def test_exported_weights_are_read_by_whom_the_umask_lets_read_them(tmp_path, usual, form):
    policy = FlowMatchingPolicy.from_pretrained("shapeworld", lora=LoRA(rank=2), max_sequence_length=16, device="cpu")
    assert modes(export(policy, tmp_path / "out", form)) == {usual}


def test_an_export_leaves_the_modes_of_other_files(tmp_path, usual):
    private = tmp_path / "private.safetensors"
    private.touch(0o600)
    export(DigitsPolicy.from_pretrained("digits", device="cpu"), tmp_path, "merged")
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "velocity.safetensors").stat().st_mode) == usual


def test_a_run_folder_that_cannot_be_written_is_refused_before_anything_is_built(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    reads = "tempfile.TemporaryFile"

    def read_only(dir):  # noqa: A002  the name of its argument
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(dir))

    monkeypatch.setattr(reads, read_only)
    assert main(["train", "shapeworld_tmpo", "--folder", "somewhere/run"]) == 2
    assert capsys.readouterr().err.startswith("error: folder somewhere/run must be writable; [Errno 30] Read-only file system")
    assert list(tmp_path.iterdir()) == []


def test_differences_of_configurations_are_shown_by_their_path():
    before = "a: {b: [1, {c: x}], rows: 3}\nlist: []\nfolder: runs/a\n"
    assert differences(before, before.replace("rows: 3", "rows: 4").replace("runs/a", "b")) == []
    assert differences(before, "a: {b: [1, {c: y}], rows: 3}\nlist: [2]\n") == [
        ("a.b.1.c", "x", "y"),
        ("list", "[]", "-"),
        ("list.0", "-", "2"),
    ]
