"""Resuming from Python with other settings: what changes is said, and what an optimizer would bring back in silence is refused."""

import json

import pytest
from ring import ring_loop

from diffalign.core import AlignmentLoop, CheckpointError
from diffalign.objectives import SoftmaxTB
from diffalign.prompts import Prompts
from diffalign.runs.settings import changes, settings_of
from diffalign.samplers import ChainSampler
from diffalign.testing import TinyPolicy, channel_reward


def loop(beta=20.0, **changed):
    given = {"rewards": channel_reward, "prompts": ["one", "two"], "prompts_per_step": 2, **changed}
    return AlignmentLoop(SoftmaxTB(TinyPolicy(), beta=beta), ChainSampler(4, 3), **given)


def test_other_settings_are_said_and_hold_from_now_on(tmp_path, capsys):
    loop().run(1, folder=tmp_path)
    again = loop(beta=5.0, seed=7, prompts=Prompts(["one", "two"], shuffle=False))
    again.run(2, folder=tmp_path, resume=True)
    said = capsys.readouterr().err
    assert (
        "step-000001 was written with other settings: objective.beta was 20.0, is now 5.0; prompts.shuffle was True, is now False; " in said
    )
    assert "seed was 0, is now 7. The run goes on with those of now." in said
    again.run(3, folder=tmp_path, resume=True)
    assert "other settings" not in capsys.readouterr().err
    assert again.objective.beta == 5.0


def test_equal_settings_are_not_mentioned(tmp_path, capsys):
    for total in (1, 2):
        loop().run(total, folder=tmp_path, resume=True)
    assert "settings" not in capsys.readouterr().err


def test_a_learning_rate_that_would_do_nothing_is_refused(tmp_path):
    loop(optimizers=1e-3, lr_factor=0.5).run(1, folder=tmp_path)
    with pytest.raises(
        CheckpointError, match=r"written with lr 0.001 of the optimizer of .policy., and this run gives 0.01: .* Give 0.001"
    ):
        loop(optimizers=1e-2, lr_factor=0.5).run(2, folder=tmp_path, resume=True)
    again = loop(optimizers=1e-3, lr_factor=0.5)
    assert again.run(2, folder=tmp_path, resume=True).steps == 2
    assert again.running["policy"].param_groups[0]["lr"] == 5e-4


def test_a_total_that_is_reached_already_is_said(tmp_path, capsys):
    loop().run(2, folder=tmp_path)
    result = loop().run(1, folder=tmp_path, resume=True)
    assert (result.steps, result.metrics) == (2, ())
    assert "has 2 steps already, so a total of 1 adds none" in capsys.readouterr().err


def test_settings_are_plain_values_by_path():
    found = settings_of(loop(rewards={"mine": channel_reward}, prompts=[f"prompt {number}" for number in range(100)]))
    assert json.loads(json.dumps(found)) == found
    assert (found["objective"], found["objective.beta"], found["sampler.samples"]) == ("SoftmaxTB", 20.0, 3)
    assert found["rewards.mine"] == "channel_reward"
    assert found["prompts.prompts"].startswith("100 entries (")
    assert not any(path.startswith("objective.policy") or path.endswith(".rows") for path in found)
    assert settings_of(ring_loop()) == settings_of(ring_loop())


def test_changes_compare_what_both_have():
    assert changes({"a": 1, "b": 2, "gone": 3}, {"a": 1, "b": 4, "new": 5}) == ["b was 2, is now 4"]
