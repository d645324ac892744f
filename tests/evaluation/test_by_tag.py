"""The table of a benchmark: means by tag, each tag weighing the same."""

import math

import pytest
import torch

from diffalign import Prompt
from diffalign.evaluation import ByTag, Evaluation, bootstrap
from diffalign.evaluation.intervals import mean_of_means


def evaluation(tags, scored=None, **rewards):
    prompts = tuple(Prompt(f"p{place}", {"tag": tag} if tag else {}) for place, tag in enumerate(tags))
    return Evaluation(0, prompts, rewards, {}, {}, torch.zeros(0), {"samples": 2, "steps": 1, "seed": 0}, scored=scored or {})


def test_tags_weigh_the_same_however_many_prompts_they_have():
    values = torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    table = ByTag.of(evaluation(["colors", "counting", "counting", "counting"], right=values, wrong=1 - values))
    assert table.counts == {"colors": 1, "counting": 3}
    assert table.tags["right"]["colors"].mean == 1
    assert table.tags["right"]["counting"] == bootstrap(values[1:])
    assert table.overall["right"].mean == pytest.approx((1 + 1 / 6) / 2)
    assert table.overall["wrong"].mean == pytest.approx((0 + 5 / 6) / 2)
    assert table.overall["right"].low is None, "of a tag with one prompt no spread is known"
    lines = table.table().splitlines()
    assert lines[0].split() == ["tag", "prompts", "right", "wrong"]
    assert lines[1].split() == ["colors", "1", "1.000", "0.000"]
    assert lines[-1].split() == ["mean", "of", "tags", "0.583", "0.417"]
    assert table.plain()["tags"]["right"]["colors"] == {"mean": 1.0, "low": None, "high": None}


def test_prompts_without_a_tag_have_a_row_of_their_own():
    assert ByTag.of(evaluation(["", ""], ocr=torch.ones(2, 2))).counts == {"untagged": 2}


def test_a_reward_that_applies_to_some_prompts_counts_in_their_tags():
    values = torch.tensor([[2.0, 2.0], [4.0, 6.0]])
    some = {"votes": torch.tensor([False, False, True, True])}
    table = ByTag.of(evaluation(["colors", "position", "counting", "position"], some, votes=values, every=torch.ones(4, 2)))
    assert table.counts == {"colors": 1, "position": 2, "counting": 1}
    assert {tag: interval.mean for tag, interval in table.tags["votes"].items()} == {"position": 5.0, "counting": 2.0}
    assert table.overall["votes"].mean == 3.5
    assert set(table.tags["every"]) == {"colors", "position", "counting"}
    assert table.table().splitlines()[1].split() == ["colors", "1", "-", "1.000"]


def test_the_width_is_that_of_a_normal_interval_of_a_stratified_mean():
    generator = torch.Generator().manual_seed(0)
    groups = [torch.randn(60, generator=generator), 3 * torch.randn(40, generator=generator) + 7]
    interval = mean_of_means(groups)
    assert interval.mean == pytest.approx(sum(group.double().mean().item() for group in groups) / 2)
    error = math.sqrt(sum(group.var().item() / len(group) for group in groups)) / 2
    assert (interval.high - interval.low) / 2 == pytest.approx(1.96 * error, rel=0.08)
    assert interval == mean_of_means(groups)


def test_one_group_is_its_mean():
    values = torch.rand(20, generator=torch.Generator().manual_seed(0))
    mine, other = mean_of_means([values]), bootstrap(values)
    assert (mine.mean, mine.low, mine.high) == pytest.approx((other.mean, other.low, other.high))
    with pytest.raises(ValueError, match="at least one group"):
        mean_of_means([])
