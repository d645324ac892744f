"""Runs with one sample of a prompt, and evaluations of one prompt: a number over pairs does not exist there, and is nowhere shown as 0."""

import json

import torch
from ring import MODES, rewarded

from diffalign.core import AlignmentLoop, Loss, Objective, Phase
from diffalign.costs.attempt import attempt
from diffalign.evaluation import HackingAlarm, PixelFeatures, evaluate
from diffalign.export.card import Card
from diffalign.policies import GaussianMixturePolicy
from diffalign.prompts import Mixture, Prompts, Source
from diffalign.runs.console import UNKNOWN
from diffalign.samplers import DeterministicSampler
from diffalign.testing import TinyPolicy, channel_reward

PAIRED = ("reward/group_std", "diversity/l_gmd")


class Shrinking(Objective):
    """Pulls all weights towards zero, and compares no samples."""

    def __init__(self, policy):
        self.policy = policy

    def phases(self):
        return (Phase({"policy": self.policy}, self.losses),)

    def losses(self, batch, update):
        yield Loss(sum(parameter.square().sum() for parameter in self.policy.trainable_parameters().values()))


def single(samples=1, **options):
    options = {"prompts": Prompts(["left", "right"]), "prompts_per_step": 2, **options}
    sampler = DeterministicSampler(steps=4, samples=samples)
    return AlignmentLoop(Shrinking(GaussianMixturePolicy(MODES, 0.3)), sampler, rewarded, **options)


def falling(images, prompts):
    falling.calls += 1
    return torch.full((len(images),), -float(falling.calls))


def test_a_run_leaves_out_what_no_pair_gives(tmp_path, capsys):
    falling.calls = 0
    hook = HackingAlarm({"falling": falling}, window=3)
    outcome = single(hooks=[hook]).run(8, folder=tmp_path, show=True)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    for line in lines:
        assert "reward" in line
        assert not set(PAIRED) & set(line)
    shown = capsys.readouterr()
    assert f"diversity {UNKNOWN}" in " ".join((shown.out + shown.err).split())
    assert outcome.diversity == []
    assert "diversity" not in str(outcome)
    assert [name for name, *_ in Card.of_run(tmp_path).measured] == ["reward", "reward/rewarded"]
    assert "L-GMD" not in (tmp_path / "report.html").read_text()
    watched = [json.loads(line) for line in (tmp_path / "watch.jsonl").read_text().splitlines()]
    assert [sorted(line) for line in watched] == [["errors", "groups", "held_out", "spread", "step", "trained"]] * 8
    assert hook.rule().evidence(watched, 8).keys() == {"falling"}


def test_sources_leave_it_out_as_well():
    mixture = Mixture({"one": Source(["a"], 1), "two": Source(["b"], 1)})
    names = {samples: set(single(samples, prompts=mixture).run(1, show=False).metrics[0]) for samples in (1, 2)}
    gone = {f"{name}{source}" for name in PAIRED for source in ("", "/one", "/two")}
    assert names[2] - names[1] == gone
    assert not names[1] - names[2]


def test_the_small_step_of_a_check_says_nothing_of_a_spread():
    assert "spread" not in attempt(single(), 4)
    assert "spread within a prompt" in attempt(single(samples=2), 4)


def test_an_evaluation_of_one_prompt_says_nothing_of_differences_between_prompts():
    one, two = (
        evaluate(TinyPolicy(), ["a", "b"][:count], channel_reward, features={"pixels": PixelFeatures()}, samples=2, steps=3)
        for count in (1, 2)
    )
    assert set(one.across) == {"vendi/pixels"}
    assert set(two.across) == {"vendi/pixels", "cosine/pixels"}
    assert "across prompts cosine/pixels" not in one.table()
    assert "across prompts cosine/pixels" in two.table()
