"""Resuming from Python with other settings: what changes is said, and what an optimizer would bring back in silence is refused."""

import functools
import json

import attrs
import pytest
import torch
from ring import ring_loop

from diffalign.core import AlignmentLoop, CheckpointError, Cosine, Hook, Interrupted, RunningScale, TrajectorySampler
from diffalign.objectives import KLBudget, SoftmaxTB
from diffalign.prompts import Prompts
from diffalign.runs.settings import changes, settings_of
from diffalign.samplers import ChainSampler, FixedPlan, TreeSampler
from diffalign.testing import TinyPolicy, channel_reward

ON = "The run goes on with those of now."


def loop(beta=20.0, **changed):
    given = {"rewards": channel_reward, "prompts": ["one", "two"], "prompts_per_step": 2, **changed}
    return AlignmentLoop(SoftmaxTB(TinyPolicy(), beta=beta), given.pop("sampler", ChainSampler(4, 3)), **given)


def test_other_settings_are_said_and_hold_from_now_on(tmp_path, capsys):
    loop().run(1, folder=tmp_path)
    again = loop(beta=5.0, seed=7, prompts=Prompts(["one", "two"], shuffle=False))
    again.run(2, folder=tmp_path, resume=True)
    said = capsys.readouterr().err
    assert "step-000001 was written with other settings: total was 1, is now 2; objective.beta was 20.0, is now 5.0; prompts." in said
    assert "prompts.shuffle was True, is now False; seed was 0, is now 7. The run goes on with those of now." in said
    again.run(3, folder=tmp_path, resume=True)
    assert f"other settings: total was 2, is now 3. {ON}" in capsys.readouterr().err
    assert again.objective.beta == 5.0


def test_a_budget_may_take_the_place_of_a_number_and_begins_at_its_start(tmp_path, capsys):
    loop().run(1, folder=tmp_path)
    again = loop(beta=KLBudget(10, start=7.0)).run(3, folder=tmp_path, resume=True)
    assert "objective.beta was 20.0, is now KLBudget. The run goes on" in capsys.readouterr().err
    first, second = (line["beta"] for line in again.metrics)
    assert first == 7.0
    assert second > 7.0
    number = loop(beta=5.0).run(4, folder=tmp_path, resume=True)
    assert "objective.beta was KLBudget, is now 5.0. The run goes on" in capsys.readouterr().err
    assert number.metrics[0]["beta"] == 5.0


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({"beta": KLBudget(10)}, {"beta": KLBudget(5)}, "objective.beta.nats was 10, is now 5"),
        (
            {"aggregation": RunningScale({"channel_reward": 1.0})},
            {"aggregation": RunningScale({"channel_reward": -5.0})},
            "aggregation.weights.channel_reward was 1.0, is now -5.0",
        ),
    ],
)
def test_a_setting_is_not_hidden_by_a_state_of_its_name(before, after, said, tmp_path, capsys):
    """The state of a budget has the beta that it found, that of a scale the weights of its running means."""
    loop(**before).run(1, folder=tmp_path)
    loop(**after).run(2, folder=tmp_path, resume=True)
    assert f"other settings: total was 1, is now 2; {said}. {ON}" in capsys.readouterr().err


def test_another_total_moves_a_schedule_and_is_said(tmp_path, capsys):
    loop(lr_factor=Cosine(1.0, 0.1)).run(2, folder=tmp_path)
    again = loop(lr_factor=Cosine(1.0, 0.1)).run(4, folder=tmp_path, resume=True)
    assert again.metrics[0]["lr_factor"] > 0.3, "the schedule had reached 0.1, and goes back"
    assert f"step-000002 was written with other settings: total was 2, is now 4. {ON}" in capsys.readouterr().err


class Ends(Hook):
    """As an alarm does whose action is to stop."""

    def step(self, loop, report):
        loop.end()


def test_equal_settings_are_not_mentioned(tmp_path, capsys):
    with pytest.raises(Interrupted):
        loop(hooks=[Ends()]).run(2, folder=tmp_path)
    assert loop().run(2, folder=tmp_path, resume=True).steps == 2
    assert "settings" not in capsys.readouterr().err


@pytest.mark.parametrize("given", [1e-2, torch.optim.AdamW, lambda parameters, lr=1e-2: torch.optim.AdamW(parameters, lr=lr)])
def test_a_learning_rate_that_would_do_nothing_is_refused(given, tmp_path):
    usual = functools.partial(torch.optim.AdamW, lr=1e-4)
    loop(optimizers=usual, lr_factor=0.5).run(1, folder=tmp_path)
    with pytest.raises(CheckpointError, match=r"was written with other optimizers: optimizers.policy.lr was 0.0001, is now 0.0"):
        loop(optimizers=given, lr_factor=0.5).run(2, folder=tmp_path, resume=True)
    again = loop(optimizers=usual, lr_factor=0.5)
    assert again.run(2, folder=tmp_path, resume=True).steps == 2
    assert again.running["policy"].param_groups[0]["lr"] == 5e-5


class Halves(Hook):
    """Moves the learning rate by itself."""

    def step(self, loop, report):
        for group in loop.running["policy"].param_groups:
            group["lr"] *= 0.5


def test_a_learning_rate_that_a_hook_moves_is_no_other_setting(tmp_path, capsys):
    for total in (1, 2):
        again = loop(hooks=[Halves()])
        again.run(total, folder=tmp_path, resume=True)
    assert again.running["policy"].param_groups[0]["lr"] == 2.5e-5
    assert f"other settings: total was 1, is now 2. {ON}" in capsys.readouterr().err


def test_a_total_that_is_reached_already_is_said(tmp_path, capsys):
    loop().run(2, folder=tmp_path)
    result = loop().run(1, folder=tmp_path, resume=True)
    assert (result.steps, result.metrics) == (2, ())
    assert "has 2 steps already, so a total of 1 adds none" in capsys.readouterr().err


def test_settings_are_plain_values_by_path():
    found = settings_of(loop(rewards={"mine": channel_reward}, prompts=[f"prompt {number}" for number in range(100)]), 1)
    assert json.loads(json.dumps(found)) == found
    assert (found["objective"], found["objective.beta"], found["sampler.samples"]) == ("SoftmaxTB", 20.0, 3)
    assert found["rewards.mine"] == "channel_reward"
    assert found["prompts.prompts"].startswith("100 entries (")
    assert not any(path.startswith("objective.policy") or path.endswith(".rows") for path in found)
    assert settings_of(ring_loop(), 1) == settings_of(ring_loop(), 1)


def test_changes_compare_what_both_have():
    assert changes({"a": 1, "b": 2, "gone": 3}, {"a": 1, "b": 4, "new": 5}) == {"b": "b was 2, is now 4"}


class Thing:
    """No plain value; its repr is an address."""


@attrs.define
class Odd(TrajectorySampler):
    """A sampler with all that a comparison may trip over."""

    stages: list = attrs.field(factory=lambda: [Thing() for _ in range(40)])
    nothing: float = float("nan")
    drawn: int = 0
    half: float = 0.0
    gone: float = 0.0
    seen: list = attrs.field(factory=list)
    parent: object = None
    unset: float = attrs.field(init=False)

    def __attrs_post_init__(self):
        self.parent = self

    def sample(self, policy, condition, progress, streams):
        self.drawn += 1
        self.half += 0.5
        self.gone = float("nan")
        self.seen.append(self.drawn)
        return ChainSampler(4, 3).sample(policy, condition, progress, streams)

    def state(self):
        return {"drawn": self.drawn, "half": torch.tensor(self.half), "gone": self.gone, "seen": list(self.seen)}

    def restore(self, state):
        self.drawn, self.half, self.gone, self.seen = state["drawn"], float(state["half"]), state["gone"], list(state["seen"])


def test_what_is_no_setting_is_not_mentioned(tmp_path, capsys):
    run = loop(sampler=Odd())
    run.run(1, folder=tmp_path)
    run.run(2, folder=tmp_path, resume=True)
    loop(sampler=Odd()).run(3, folder=tmp_path, resume=True)
    said = capsys.readouterr().err
    for before in (1, 2):
        assert f"other settings: total was {before}, is now {before + 1}. {ON}" in said


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"prompts": ["a", "b"]}, {"prompts": ["a", "b", "c"]}),
        ({"prompts": [str(number) for number in range(20)]}, {"prompts": [str(number) for number in range(40)]}),
        ({"sampler": TreeSampler(5, FixedPlan((1, 2)))}, {"sampler": TreeSampler(5, FixedPlan((1, 2, 3)))}),
        ({"rewards": {"a": channel_reward}}, {"rewards": {"b": channel_reward}}),
    ],
)
def test_what_is_longer_or_has_another_name_has_changed(before, after):
    assert changes(settings_of(loop(**before), 1), settings_of(loop(**after), 1))
