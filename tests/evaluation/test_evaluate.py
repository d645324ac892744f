import json

import pytest
import torch
from ring import MODES, rewarded, ring_loop

from diffalign.core import Prompt
from diffalign.evaluation import HeldOutEvaluation, evaluate, paired_change
from diffalign.policies import GaussianMixturePolicy

PROMPTS = [Prompt(name) for name in ("a", "b", "c", "d", "e")]


def brightness(images, prompts):
    return images.flatten(1).mean(dim=1)


def test_chunks_of_rows_do_not_change_the_result():
    policy = GaussianMixturePolicy(MODES, 0.3)
    whole = evaluate(policy, PROMPTS, {"near": rewarded}, samples=4, steps=5, rows=1000)
    pieces = evaluate(policy, PROMPTS, {"near": rewarded}, samples=4, steps=5, rows=8)
    torch.testing.assert_close(whole.rewards["near"], pieces.rewards["near"])
    torch.testing.assert_close(whole.l_gmd, pieces.l_gmd)
    assert whole.rewards["near"].shape == (5, 4)


def test_a_policy_is_compared_with_another_on_the_same_noise():
    policy = GaussianMixturePolicy(MODES, 0.3)
    first = evaluate(policy, PROMPTS, {"near": rewarded}, samples=4, steps=5)
    again = evaluate(policy.fork(), PROMPTS, {"near": rewarded}, samples=4, steps=5)
    other = evaluate(policy, PROMPTS, {"near": rewarded}, samples=4, steps=5, seed=1)
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)


def test_a_single_mode_is_less_diverse_than_eight():
    ring = evaluate(GaussianMixturePolicy(MODES, 0.3), PROMPTS, {"b": brightness}, samples=8, steps=8)
    point = evaluate(GaussianMixturePolicy(MODES[:1], 0.3), PROMPTS, {"b": brightness}, samples=8, steps=8)
    assert point.l_gmd.mean() < ring.l_gmd.mean() - 1


def test_paired_change_by_hand():
    before, after = torch.tensor([[0.0, 1.0], [2.0, 2.0]]), torch.tensor([[1.0, 2.0], [2.0, 4.0]])
    mean, half = paired_change(before, after)  # changes of the prompts: 1 and 1
    assert (mean, half) == (1.0, 0.0)
    mean, half = paired_change(torch.zeros(2), torch.tensor([0.0, 2.0]))  # mean 1, std sqrt(2), half 1.96 sqrt(2) / sqrt(2)
    assert mean == 1.0
    assert half == pytest.approx(1.96)


def test_held_out_evaluation_before_during_and_after(tmp_path):
    (tmp_path / "held-out.txt").write_text("one\ntwo\n")
    hook = HeldOutEvaluation(str(tmp_path / "held-out.txt"), every=2, samples=3, steps=4, rewards={"brightness": brightness})
    ring_loop(tmp_path / "run", [hook]).run(5)
    assert [result.step for result in hook.results] == [0, 2, 4, 5]
    entries = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert [entry["step"] for entry in entries] == [0, 2, 4, 5]
    assert set(entries[-1]["rewards"]) == {"rewarded", "brightness"}
    assert [row["prompt"] for row in entries[-1]["by_prompt"]] == ["one", "two"]
    assert sorted(path.name for path in (tmp_path / "run" / "images").iterdir())[-1] == "step-000005.png"


def test_evaluation_leaves_training_as_it_is(tmp_path):
    (tmp_path / "held-out.txt").write_text("one\ntwo\n")
    watched = ring_loop(hooks=[HeldOutEvaluation(str(tmp_path / "held-out.txt"), every=1, samples=3, steps=4)])
    alone = ring_loop()
    watched.run(3)
    alone.run(3)
    for mine, other in zip(watched.objective.policy.parameters(), alone.objective.policy.parameters(), strict=True):
        assert torch.equal(mine, other)
