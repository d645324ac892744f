"""The bundle for a bug report: everything that explains a run, and nothing heavy."""

import json
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from toy import TOY

from diffalign.cli import main
from diffalign.runs import bundle as bundling

RUN = f"{TOY}total: 2\n"


@pytest.fixture
def trained(tmp_path, monkeypatch):
    (tmp_path / "toy.yaml").write_text(RUN)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "toy.yaml"]) == 0
    return tmp_path / "runs" / "toy"


def packed(file):
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name) for name in archive.namelist()}


def test_a_run_is_explained_without_its_weights(trained, tmp_path, capsys):
    (tmp_path / "console.txt").write_text("step 1\nerror: something\n")
    capsys.readouterr()
    assert main(["bundle", "runs/toy", "--log", "console.txt"]) == 0
    contents = packed(tmp_path / "toy-bundle.zip")
    for name in (
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "step-000002/manifest.json",
        "environment-now.json",
        "logs/console.txt",
    ):
        assert name in contents, name
    assert contents["metrics.jsonl"] == (trained / "metrics.jsonl").read_bytes()
    assert json.loads(contents["environment-now.json"])["packages"]["torch"] == torch.__version__
    weights = [path.relative_to(trained).as_posix() for path in trained.rglob("*") if path.suffix not in bundling.TEXTS and path.is_file()]
    assert any(name.endswith(".safetensors") for name in weights)
    assert not set(weights) & set(contents)
    assert all(name in contents["files.txt"].decode() for name in weights)  # named, with sizes, but not packed
    printed = capsys.readouterr().out
    assert all(name in printed for name in contents)


def test_the_configuration_in_a_bundle_is_the_run_again(trained, tmp_path):
    assert main(["bundle", "runs/toy", "--out", "report/b.zip"]) == 0
    (tmp_path / "again.yaml").write_bytes(packed(tmp_path / "report" / "b.zip")["config.yaml"])
    assert main(["train", "again.yaml", "--folder", "runs/again"]) == 0
    toy, again = ((tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines() for name in ("toy", "again"))
    assert [json.loads(line)["reward"] for line in again] == [json.loads(line)["reward"] for line in toy]


def test_of_a_long_file_the_last_whole_lines_are_packed(tmp_path, monkeypatch):
    monkeypatch.setattr(bundling, "LARGEST", 100)
    (tmp_path / "config.yaml").write_text("total: 1\n")
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(100)))
    bundling.bundle(tmp_path, tmp_path / "out" / "b.zip")
    lines = packed(tmp_path / "out" / "b.zip")["metrics.jsonl"].decode().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(100 - len(lines), 100))
    assert 3 < len(lines) < 8


def test_neither_tensors_nor_links_out_of_the_folder_are_packed(tmp_path):
    folder = tmp_path / "run"
    (folder / "offending").mkdir(parents=True)
    (folder / "config.yaml").write_text("total: 1\n")
    save_file({"latents": torch.zeros(4)}, folder / "offending" / "batch-0.safetensors")
    (folder / "offending" / "batch-0.json").write_text("{}")
    (tmp_path / "private.txt").write_text("a key")
    (folder / "link.txt").symlink_to(tmp_path / "private.txt")
    bundling.bundle(folder, tmp_path / "b.zip")
    assert set(packed(tmp_path / "b.zip")) == {"config.yaml", "offending/batch-0.json", "environment-now.json", "files.txt"}


def test_no_link_by_which_people_vote_is_packed(tmp_path):
    folder, token = tmp_path / "run", "s3cr-t_Token"
    (folder / "nested").mkdir(parents=True)
    (folder / "config.yaml").write_text("total: 1\n")
    for name in ("votes.links.json", "nested/mine.links.json"):
        (folder / name).write_text(json.dumps({"ann": token}))
    said = f"votes of ann: http://127.0.0.1:8717/?token={token}\nstep 1 of 2: waiting for votes at http://127.0.0.1:8717/?token={token}\n"
    (folder / "console.log").write_text(said)
    (tmp_path / "log.txt").write_text(said)
    bundling.bundle(folder, tmp_path / "b.zip", [tmp_path / "log.txt"])
    contents = packed(tmp_path / "b.zip")
    assert set(contents) == {"config.yaml", "console.log", "environment-now.json", "files.txt", "logs/log.txt"}
    assert not [name for name, content in contents.items() if token.encode() in content]
    assert contents["logs/log.txt"].decode() == said.replace(token, "***")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "RUN must be a run folder, which has a config.yaml"),
        ([".", "--log", "nowhere.txt"], "--log must name a file"),
        ([".", "--log", "a.txt", "--log", "more/a.txt"], "each of another name"),
        ([".", "--total", "3"], "bundle takes a run folder and nothing else"),
    ],
)
def test_what_cannot_be_packed_is_one_message(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("total: 1\n")
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.txt").write_text("")
    assert main(["bundle", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.zip*"))


def test_a_disk_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("total: 1\n")
    file = tmp_path / "b.zip"
    file.write_text("the last one")

    def full(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    with pytest.raises(OSError, match="no space left"):
        bundling.bundle(tmp_path, file)
    assert file.read_text() == "the last one"
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "b.zip"}
