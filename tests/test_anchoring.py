"""File names in a run file become whole paths, wherever they stand in it, so that the run is the same one from any folder."""

from pathlib import Path

import pytest
import yaml

from diffalign import config
from diffalign.cli import main
from diffalign.config.anchoring import anchored
from diffalign.config.blueprint import Part
from diffalign.prompts import Prompts

RUN = """
policy: {class_path: diffalign.testing.TinyPolicy}
objective: SoftmaxTB
sampler: {class_path: ChainSampler, init_args: {steps: 3, samples: 2}}
rewards: diffalign.testing.channel_reward
prompts: {class_path: Mixture, init_args: {sources: {a: {prompts: {path: a.txt}}, b: {prompts: {path: b.txt}}}}}
evaluation: {prompts: {a: a.txt, b: b.txt}, steps: 2, samples: 2}
prompts_per_step: 2
total: 1
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run file and what it names; commands are given in the folder above."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "mixed.yaml").write_text(RUN)
    (folder / "a.txt").write_text("one\n")
    (folder / "b.txt").write_text("two\nthree\n")
    monkeypatch.chdir(tmp_path)
    return folder


def test_prompt_files_by_source_are_found_from_any_folder(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["train", "work/mixed.yaml", "--folder", "run"]) == 0
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written["evaluation"]["init_args"]["prompts"] == {"a": str(work / "a.txt"), "b": str(work / "b.txt")}
    (tmp_path / "third").mkdir()
    (tmp_path / "third" / "a.txt").write_text("another\n")
    monkeypatch.chdir(tmp_path / "third")
    assert main(["evaluate", "../run", "--out", "measured"]) == 0
    measured = yaml.safe_load(Path("measured/evaluation.json").read_text())
    assert [row["prompt"] for row in measured["by_prompt"]] == ["one", "two", "three"]


def test_votes_files_are_found_from_any_folder(work: Path) -> None:
    for name in ("session", "old.jsonl"):  # a `Path` needs no suffix to be one
        (work / name).write_text('{"votes": 1, "ballot": "likes", "people": ["ann"], "answers": [0, 1]}\n')
    voters = "{class_path: diffalign.voting.Replayed, init_args: {file: session}}"
    votes = f"{{class_path: diffalign.voting.Votes, init_args: {{voters: {voters}, earlier: old.jsonl, file: new.jsonl}}}}"
    (work / "votes.yaml").write_text(RUN.replace("diffalign.testing.channel_reward", votes))
    run = config.parse("work/votes.yaml")
    run.build()
    given = run.tree["rewards"].arguments
    assert (given["voters"].arguments["file"], given["earlier"]) == (work / "session", work / "old.jsonl")
    assert given["file"] == Path("new.jsonl"), "it is not there yet"
    (work / "new.jsonl").write_text((work / "old.jsonl").read_text())
    given = config.parse("work/votes.yaml").tree["rewards"].arguments
    assert given["file"] == Path("new.jsonl"), "it is written where the command is given; the one beside the run file is of another run"


def test_names_inside_mappings_and_lists_are_names_and_prompts_are_none(work: Path) -> None:
    def part(target: object, **arguments: object) -> Part:
        return Part("here", "", target, arguments)

    whole = str(work / "a.txt")
    given = part(dict, files=["a.txt", "none.txt", Path("a.txt")], nested={"x": [{"y": "a.txt"}]}, path=("b", "work"), words=["b", "work"])
    found = anchored(given, work).arguments
    assert found["files"] == [whole, "none.txt", Path(whole)]
    assert found["nested"] == {"x": [{"y": whole}]}
    assert found["path"] == ("b", str(work)), "its argument is called like a place"
    assert found["words"] == ["b", "work"]
    assert anchored(part(Prompts, prompts=["a.txt"]), work).arguments["prompts"] == ["a.txt"]


def test_the_folder_of_a_run_is_where_the_command_is_given(work: Path) -> None:
    (work / "runs" / "mixed").mkdir(parents=True)
    assert config.parse("work/mixed.yaml").folder == Path("runs/mixed")
    assert config.parse("work/mixed.yaml", ["--folder", "work"]).folder == Path("work")
