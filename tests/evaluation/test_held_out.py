import json

import pytest
import torch
from ring import ring_loop

from diffalign.core import AlignmentLoop, Average, ConfigError, Hook
from diffalign.evaluation import HeldOutEvaluation, evaluate
from diffalign.objectives import DiffusionNFT
from diffalign.policies import TDMPolicy
from diffalign.samplers import DeterministicSampler
from diffalign.testing.doubles import TinyPolicy, channel_reward


def brightness(images, prompts):
    return images.flatten(1).mean(dim=1)


def prompts(folder):
    (folder / "held-out.txt").write_text("one\ntwo\n")
    return str(folder / "held-out.txt")


def test_held_out_evaluation_before_during_and_after(tmp_path):
    hook = HeldOutEvaluation(prompts(tmp_path), every=2, samples=3, steps=4, rewards={"brightness": brightness})
    ring_loop(tmp_path / "run", [hook]).run(5)
    assert [result.step for result in hook.results] == [0, 2, 4, 5]
    entries = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert [entry["step"] for entry in entries] == [0, 2, 4, 5]
    assert set(entries[-1]["rewards"]) == {"rewarded", "brightness"}
    assert set(entries[-1]["diversity"]) == {"l_gmd", "ms_ssim_distance", "cosine/pixels", "vendi/pixels", "modes/pixels"}
    assert [row["prompt"] for row in entries[-1]["by_prompt"]] == ["one", "two"]
    assert sorted(path.name for path in (tmp_path / "run" / "images").iterdir())[-1] == "step-000005.png"


def test_a_further_reward_does_not_take_the_place_of_a_trained_one(tmp_path):
    hook = HeldOutEvaluation(prompts(tmp_path), samples=3, steps=4, rewards={"rewarded": brightness})
    with pytest.raises(ConfigError, match=r"evaluation\.rewards\.rewarded must have another name: the run trains on a reward 'rewarded'"):
        ring_loop(tmp_path / "run", [hook]).run(1)
    assert not (tmp_path / "run" / "evaluation.json").exists()


def test_a_student_is_evaluated_with_its_own_steps_and_others_with_28(tmp_path):
    for policy, steps in ((TDMPolicy(TinyPolicy(), steps=3), 3), (TinyPolicy(), 28)):
        hook = HeldOutEvaluation(prompts(tmp_path), samples=2)
        loop = AlignmentLoop(DiffusionNFT(policy, levels=2), DeterministicSampler(3, 2), channel_reward, ["one"], hooks=[hook])
        loop.advance(1)
        assert [result.settings["steps"] for result in hook.results] == [steps, steps]


class Reader(Hook):
    """Notes the steps of the evaluations that it finds."""

    def __init__(self):
        self.found = []

    def note(self, loop):
        self.found.append([(result.step, result.repeated) for result in loop.evaluations])

    def start(self, loop, step, total):
        self.note(loop)

    def step(self, loop, report):
        self.note(loop)

    def stop(self, loop, step, error):
        self.note(loop)


def test_hooks_after_an_evaluation_find_it_at_once_and_those_before_at_their_next_call(tmp_path):
    before, after = Reader(), Reader()
    loop = ring_loop(None, [before, HeldOutEvaluation(prompts(tmp_path), every=2, samples=3, steps=4), after])
    loop.run(3)
    zero, two, three = (0, True), (2, True), (3, True)
    assert after.found == [[zero], [zero], [zero, two], [zero, two], [zero, two, three]]
    assert before.found == [[], [zero], [zero], [zero, two], [zero, two]]
    after.found.clear()
    loop.run(1)  # a run begins with none of the run before
    assert after.found[0] == [zero]


def test_an_evaluation_at_the_ends_alone_is_not_repeated(tmp_path):
    reader = Reader()
    ring_loop(None, [HeldOutEvaluation(prompts(tmp_path), samples=3, steps=4), reader]).run(1)
    assert reader.found[-1] == [(0, False), (1, False)]


def test_the_average_is_what_is_evaluated(tmp_path):
    hook = HeldOutEvaluation(prompts(tmp_path), samples=3, steps=4)
    loop = ring_loop(tmp_path / "run", [hook], average=Average(decay=0.99))
    loop.run(4)
    names = list(hook.results[0].prompts)
    averaged = evaluate(loop.average.policy, names, loop.named_rewards(), samples=3, steps=4)
    last = evaluate(loop.objective.policy, names, loop.named_rewards(), samples=3, steps=4)
    assert torch.equal(hook.results[-1].images, averaged.images)
    assert not torch.equal(hook.results[-1].images, last.images)


def test_evaluation_leaves_training_as_it_is(tmp_path):
    watched = ring_loop(hooks=[HeldOutEvaluation(prompts(tmp_path), every=1, samples=3, steps=4)])
    alone = ring_loop()
    watched.run(3)
    alone.run(3)
    for mine, other in zip(watched.objective.policy.parameters(), alone.objective.policy.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_a_resumed_run_repeats_the_evaluations_after_its_checkpoint(tmp_path):
    ring_loop(tmp_path / "run", [HeldOutEvaluation(prompts(tmp_path), every=2, samples=3, steps=4)]).run(5)
    ring_loop(tmp_path / "run", [HeldOutEvaluation(prompts(tmp_path), every=2, samples=3, steps=4)]).run(6, start=2)
    entries = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert [entry["step"] for entry in entries] == [0, 2, 4, 6]


def test_without_pictures_none_are_written(tmp_path):
    ring_loop(tmp_path / "run", [HeldOutEvaluation(prompts(tmp_path), samples=3, steps=4, pictures=0)]).run(1)
    assert not list((tmp_path / "run" / "images").glob("*.png"))
