"""`diffalign evaluate --suite drawbench-like` with the suite's own rewards, on tiny random weights."""

import json

import pytest
from tiny_models import aesthetic_head, clip_folder, image_reward_folder

from diffalign.cli import main

RUN = """
policy: {class_path: GaussianMixturePolicy, init_args: {means: [[-1.0, 0.0], [1.0, 0.0]], scale: 0.3}}
objective: {class_path: DGPO, init_args: {levels: 2}}
sampler: {class_path: DeterministicSampler, init_args: {steps: 4, samples: 2}}
rewards: JPEGCompressibility
prompts: {class_path: Prompts, init_args: {prompts: [one, two]}}
optimizers: {default: {class_path: AdamW, init_args: {lr: 0.1}}}
prompts_per_step: 2
total: 1
"""
PROMPTS = """{"prompt": "a castle of glass", "tag": "scenes"}
{"prompt": "two foxes at dawn", "tag": "animals"}
{"prompt": "an owl that reads", "tag": "animals"}
"""


def test_preference_suite_tells_the_three_scores_by_tag(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, content in (("toy.yaml", RUN), ("asked.jsonl", PROMPTS)):
        (tmp_path / name).write_text(content)
    for name in ("clip", "head", "blip"):
        (tmp_path / name).mkdir()
    clip_folder(tmp_path / "clip")
    aesthetic_head(tmp_path / "head")
    image_reward_folder(tmp_path / "blip")
    parts = {
        "pickscore": "{class_path: PickScore, init_args: {model: clip}}",
        "imagereward": "{class_path: ImageReward, init_args: {weights: blip, tokenizer: blip}}",
        "aesthetic": "{class_path: Aesthetic, init_args: {model: clip, head: head}}",
    }
    chosen = [word for name, part in parts.items() for word in ("--reward", f"{name}={part}")]
    arguments = ["--suite", "drawbench-like", "--prompts", "asked.jsonl", "--samples", "2", "--steps", "2", "--out", "found"]
    assert main(["evaluate", "toy.yaml", *arguments, *chosen]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "found" / "evaluation.json").read_text())
    assert set(found["rewards"]) == set(parts)
    assert found["suite"]["prompts"] == {"scenes": 1, "animals": 2}
    castle, foxes, owl = (entry["rewards"] for entry in found["by_prompt"])
    for name in parts:
        tags = {tag: entry["mean"] for tag, entry in found["suite"]["tags"][name].items()}
        assert tags == {"scenes": pytest.approx(castle[name]), "animals": pytest.approx((foxes[name] + owl[name]) / 2)}
        assert found["suite"]["mean of tags"][name]["mean"] == pytest.approx(sum(tags.values()) / 2)
        assert foxes[name] != owl[name], "the scores are of the pictures and prompts"
    header = next(line.split() for line in printed.splitlines() if line.split()[:1] == ["tag"])
    assert header == ["tag", "prompts", *parts]
