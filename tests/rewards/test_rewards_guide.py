"""What docs/rewards.md says is run, and what there is stands in it."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from tiny_models import clip_folder

import diffalign.rewards
from diffalign import Prompt, config
from diffalign.core import ConfigError, Reward
from diffalign.prompts import read_prompts
from diffalign.rewards import OCR, Cached, Clipped, Concurrent, PickScore
from diffalign.rewards.geneval_rules import wanted
from diffalign.rewards.ocr import wanted_text
from diffalign.vocabulary import NAMES

GUIDE = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
RUN = {
    "policy": {"class_path": "GaussianMixturePolicy", "init_args": {"means": [[-1, 0.0], [1, 0.0]], "scale": 0.2}},
    "objective": {"class_path": "SoftmaxTB", "init_args": {"beta": 2}},
    "sampler": {"class_path": "TreeSampler", "init_args": {"steps": 6, "plan": {"class_path": "FixedPlan", "init_args": {"eta": 0.5}}}},
    "prompts": {"class_path": "Prompts", "init_args": {"prompts": ['the text "one"', 'the text "two"']}},
}


def snippets(language):
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, flags=re.DOTALL)


def built(rewards):
    return config.parse_text(yaml.safe_dump({**RUN, "rewards": rewards})).build().named_rewards()


def test_snippets_of_the_guide_run():
    names: dict = {}
    for snippet in snippets("python"):
        exec(compile(snippet, "docs/rewards.md", "exec"), names)
    generator = torch.Generator().manual_seed(0)
    images = torch.stack([torch.full((3, 16, 16), 0.5), torch.rand(3, 16, 16, generator=generator)])
    flat, noisy = names["reward"](images, [Prompt("a"), Prompt("b")]).tolist()
    assert noisy - flat == pytest.approx(1.0, abs=0.1), "the sharp one is liked; the difference in size is small"
    darkness = names["Darkness"]()
    assert darkness(images[:1], [Prompt("a", {"darkness": 0.25})]).item() == pytest.approx(0.75)
    with pytest.raises(ConfigError, match="Darkness needs a number 'darkness' in the metadata of prompt 'b'"):
        darkness.require([Prompt("a", {"darkness": 0.5}), Prompt("b")])


def test_prompt_lines_of_the_guide_are_understood(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(snippets("json")[0])
    sign, cats = read_prompts(str(file))
    assert wanted_text(sign) == "Open late"
    want = wanted(cats, NAMES)
    assert want.counting
    assert [(clause.name, clause.count) for clause in want.include + want.exclude] == [("cat", 2), ("cat", 3)]


def test_rewards_of_the_guides_run_file_are_built(tmp_path):
    """With a folder in place of the hub's weights."""
    folder, _, _ = clip_folder(tmp_path)
    rewards = yaml.safe_load(snippets("yaml")[0])["rewards"]
    assert rewards["preference"] == "PickScore"
    rewards["preference"] = {"class_path": "PickScore", "init_args": {"model": folder}}
    named = built(rewards)
    assert {name: type(reward) for name, reward in named.items()} == {"preference": PickScore, "text": OCR, "size": Clipped}
    assert named["text"].match == "partial"
    assert named["size"].low == -60


def test_composed_rewards_are_built_from_a_run_file(tmp_path):
    folder, _, _ = clip_folder(tmp_path)
    pick = {"class_path": "PickScore", "init_args": {"model": folder, "batch": 2}}
    cached = {"class_path": "Cached", "init_args": {"reward": pick, "size": 10}}
    liked = {"class_path": "BinaryLiking", "init_args": {"reward": "JPEGCompressibility", "threshold": -1}}
    together = {"class_path": "Concurrent", "init_args": {"rewards": {"a": cached, "b": liked}, "weights": {"a": 1, "b": 2.5}}}
    reward = built({"all": together})["all"]
    assert isinstance(reward, Concurrent)
    assert isinstance(reward.rewards["a"], Cached)
    assert reward(torch.rand(2, 3, 32, 32), [Prompt("a"), Prompt("b")]).shape == (2,)
    pick["init_args"]["model"] = "/nowhere"
    with pytest.raises(ConfigError, match=r"rewards.*PickScore\.model must be a local folder.*'/nowhere'"):
        built({"all": together})


def test_every_reward_stands_in_the_guide():
    kinds = {name: getattr(diffalign.rewards, name) for name in diffalign.rewards.__all__}
    names = [name for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Reward)]
    assert len(names) >= 12
    for name in names:
        assert f"`{name}`" in GUIDE, name
