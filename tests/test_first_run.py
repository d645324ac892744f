"""What somebody does first: five commands in an empty folder that has the weights of a model and of rewards, and nothing else."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_pipelines import saved

from diffalign import config
from diffalign.cli import main
from diffalign.vocabulary import NAMES

sys.path.append(str(Path(__file__).parent / "rewards"))
RUN = "sd35_tmpo_three_tasks"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Tiny random weights in the published forms: a pipeline, a CLIP, a detector of COCO's 80 classes."""
    from test_geneval import tiny_detector
    from tiny_models import clip_folder

    folder = tmp_path_factory.mktemp("weights")
    shutil.copytree(saved(tmp_path_factory, "sd3"), folder / "sd3")
    clip_folder(folder / "clip")
    tiny_detector(NAMES).save_pretrained(folder / "detector")
    return folder


@pytest.fixture
def empty(tmp_path, monkeypatch, weights):
    for part in weights.iterdir():
        (tmp_path / part.name).symlink_to(part)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def done(capsys, *words):
    assert main(list(map(str, words))) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_everything_that_is_missing_is_one_message(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["check", RUN]) == 2
    said = capsys.readouterr().err
    assert said.count("error: ") == 1
    assert "4 parts of the run cannot be built:\n- " in said
    assert said.splitlines()[-1].startswith("- policy.path must be a diffusers pipeline folder")  # after what may be on this machine
    for part in ("PickScore.model", "HPSv2.weights", "HPSv2.tokenizer", "GenEval.detector", "GenEval.clip"):
        assert f"{part} must be" in said
    assert len(said.splitlines()) <= 20
    assert list(tmp_path.iterdir()) == []


def test_one_missing_part_is_told_as_before(empty, capsys):
    assert main(["check", "flux1_tmpo_ocr", "--policy.path", "nowhere"]) == 2
    said = capsys.readouterr().err
    assert "error: policy.path must be a diffusers pipeline folder" in said
    assert "parts of the run" not in said


def test_five_commands_from_an_empty_folder(empty, capsys):
    pytest.importorskip("rapidocr")
    judge = "{class_path: GenEval, init_args: {detector: detector, clip: clip, side: 64, credit: correct}}"
    tiny = ["--policy.path=sd3", "--policy.resolution=32", "--policy.max_sequence_length=24", "--policy.dtype=float32"]
    rewards = [
        *("--rewards.pickscore.model=clip", "--rewards.hpsv2=JPEGCompressibility"),
        *("--rewards.geneval.detector=detector", "--rewards.geneval.clip=clip", "--rewards.geneval.side=64"),
    ]
    short = ["--sampler.plan.branches=2", "--objective.updates=1", "--average.every=1", "--prompts_per_step=3", "--total=1"]
    for task in ("composition", "text"):
        assert f"{task}.jsonl: 3 prompts" in done(capsys, "prompts", f"{task}-held-out", f"{task}.jsonl", "--count", 3)
    done(capsys, "train", RUN, *tiny, *rewards, *short, "--evaluation=null")
    folder = empty / "runs" / RUN
    (step,) = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {f"reward/{name}" for name in ("pickscore", "hpsv2", "geneval", "ocr")} <= step.keys()
    assert {"preference", "composition", "text"} <= {name.rpartition("/")[2] for name in step}
    few = ["--samples", 2, "--steps", 2]
    printed = done(capsys, "evaluate", folder, "--suite", "geneval", "--prompts", "composition.jsonl", "--reward", f"geneval={judge}", *few)
    assert "suite geneval, mean [95 % interval over prompts]" in printed
    printed = done(capsys, "evaluate", folder, "--suite", "ocr", "--prompts", "text.jsonl", *few)
    tags = {json.loads(line)["tag"] for line in (empty / "text.jsonl").read_text().splitlines()}
    found = json.loads((folder / "evaluations" / "step-000001-ocr" / "evaluation.json").read_text())
    assert found["suite"]["name"] == "ocr"
    assert all(tag in printed for tag in tags)
    (folder / "metrics.jsonl").write_text("no JSON\n")  # what the model card tells is missing, and the weights are there
    done(capsys, "export", folder)
    lora = load_file(folder / "export" / "diffusers" / "pytorch_lora_weights.safetensors")
    assert any(tensor.any() for name, tensor in lora.items() if "lora_B" in name)


def test_runs_of_published_models_go_by_name():
    examples = {file.stem for file in (Path(__file__).parents[1] / "examples").glob("*.yaml")}
    assert config.built_in().keys() == examples
