"""A reward that fails costs the step under way and no more, in training and in an evaluation, in one process and in several."""

import json
from pathlib import Path

import pytest
import torch
from core.meeting import Meeting

from diffalign.cli import main
from diffalign.core import AlignmentLoop, CheckpointError, Hook, NonFiniteRewardError, RewardError
from diffalign.objectives import SoftmaxTB
from diffalign.prompts import Prompts
from diffalign.runs.checkpoints import Checkpoints, complete_checkpoints
from diffalign.samplers import ChainSampler, FixedPlan, TreeSampler
from diffalign.testing import TinyPolicy, channel_reward

RUN = """
policy: {class_path: diffalign.testing.TinyPolicy}
objective: SoftmaxTB
sampler: {class_path: ChainSampler, init_args: {steps: 3, samples: 2}}
rewards: test_failing_reward.flaky
prompts: [one, two]
prompts_per_step: 1
total: 4
"""
HELD_OUT = "evaluation: {prompts: held-out.txt, steps: 2, samples: 2, every: 2}\ncheckpoint_every: 2\n"


def flaky(images, prompts):
    """Fails at the call whose number is in the file `at`, once; gives `value` of that file in place of the error, if there is one."""
    at = Path("at.json")
    if at.exists():
        left, value = json.loads(at.read_text())
        if left:
            at.write_text(json.dumps([left - 1, value]))
        else:
            at.unlink()
            if value is not None:
                return torch.full((len(images),), float(value))
            raise ConnectionError("503")
    return channel_reward(images, prompts)


def fail_at(call, value=None):
    Path("at.json").write_text(json.dumps([call, value]))


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    (tmp_path / "toy.yaml").write_text(RUN)
    (tmp_path / "watched.yaml").write_text(RUN + HELD_OUT)
    (tmp_path / "held-out.txt").write_text("three\nfour\n")
    monkeypatch.chdir(tmp_path)


def steps(folder):
    return [json.loads(line)["step"] for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def equal(one, other):
    files = [Path(folder) / "step-000004" / "policy.safetensors" for folder in (one, other)]
    return files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(("value", "said"), [(None, "raised ConnectionError for 2 images: 503"), ("nan", "returned nan for image 0 of 2")])
def test_a_failing_reward_leaves_a_checkpoint_of_the_last_finished_step(value, said, capsys):
    assert main(["train", "toy.yaml", "--folder", "whole"]) == 0
    fail_at(2, value)
    assert main(["train", "toy.yaml", "--folder", "cut"]) == 1
    text = capsys.readouterr().err
    assert said in text
    assert "; the last checkpoint is cut/step-000002. Continue by: diffalign train toy.yaml --resume --folder cut\n" in text
    assert steps("cut") == [0, 1]
    assert main(["train", "toy.yaml", "--folder", "cut", "--resume"]) == 0
    assert steps("cut") == [0, 1, 2, 3]
    assert equal("whole", "cut")


def test_a_reward_that_fails_in_the_first_step_leaves_nothing(capsys):
    fail_at(0)
    assert main(["train", "toy.yaml", "--folder", "cut"]) == 1
    assert "images: 503" in (text := capsys.readouterr().err)
    assert text.endswith("; there is no checkpoint in cut yet\n")


def test_a_reward_that_fails_again_at_once_leaves_the_checkpoint_that_is_there(capsys):
    for again in ([], ["--resume"]):
        fail_at(0 if again else 2)
        assert main(["train", "toy.yaml", "--folder", "cut", *again]) == 1
        assert "the last checkpoint is cut/step-000002." in capsys.readouterr().err


def test_a_step_is_kept_whose_evaluation_fails(capsys):
    assert main(["train", "watched.yaml", "--folder", "whole"]) == 0
    fail_at(3)  # one call before training, two steps, and then the evaluation
    assert main(["train", "watched.yaml", "--folder", "cut"]) == 1
    text = capsys.readouterr().err
    assert "in the evaluation at step 2, HeldOutEvaluation: reward 'flaky' raised ConnectionError" in text
    assert "; the last checkpoint is cut/step-000002. Continue" in text
    assert steps("cut") == [0, 1]
    assert main(["train", "watched.yaml", "--folder", "cut", "--resume"]) == 0
    assert [entry["step"] for entry in json.loads(Path("cut/evaluation.json").read_text())] == [0, 2, 4]
    assert equal("whole", "cut")
    for file in ("evaluation.json", "best/policy.safetensors"):
        assert Path("cut", file).read_bytes() == Path("whole", file).read_bytes()


def test_the_last_evaluation_is_left_for_the_resume_if_it_fails(capsys):
    fail_at(6)
    assert main(["train", "watched.yaml", "--folder", "cut"]) == 1
    text = capsys.readouterr().err
    assert "in the evaluation at step 4, HeldOutEvaluation: reward 'flaky' raised" in text
    assert "; the last checkpoint is cut/step-000004. Continue" in text
    assert not Path("cut/report.html").exists(), "it would say that nothing is left to do"
    assert main(["train", "watched.yaml", "--folder", "cut", "--resume"]) == 0
    assert [entry["step"] for entry in json.loads(Path("cut/evaluation.json").read_text())] == [0, 2, 4]
    assert Path("cut/report.html").exists()


def test_an_evaluation_that_fails_before_the_first_step_is_named(capsys):
    fail_at(0)
    assert main(["train", "watched.yaml", "--folder", "cut"]) == 1
    assert "in the evaluation at step 0, HeldOutEvaluation: reward 'flaky' raised" in capsys.readouterr().err
    assert not complete_checkpoints(Path("cut"))


def test_python_is_told_how_to_go_on(tmp_path):
    def loop():
        return AlignmentLoop(SoftmaxTB(TinyPolicy()), ChainSampler(4, 3), flaky, ["one", "two"], prompts_per_step=2)

    folder = tmp_path / "cut"
    fail_at(2)
    with pytest.raises(RewardError, match="images: 503") as caught:
        loop().run(4, folder=folder)
    assert str(caught.value).endswith(
        f"; the last checkpoint is {folder}/step-000002. Continue by: loop.run(4, folder='{folder}', resume=True)"
    )
    loop().run(4, folder=folder, resume=True)
    loop().run(4, folder=tmp_path / "whole")
    assert equal(folder, tmp_path / "whole")


@pytest.mark.parametrize(("failing", "value", "kind"), [(0, None, RewardError), (1, None, RewardError), (1, "nan", NonFiniteRewardError)])
def test_several_processes_save_together_if_the_reward_of_one_fails(failing, value, kind, tmp_path):
    folder = tmp_path / "run"

    def loop(devices, reward):
        sampler, prompts = TreeSampler(5, FixedPlan((1, 2)), rows=5), Prompts(list("abcd"))
        objective = SoftmaxTB(TinyPolicy(), updates=2, rows=3)
        hooks = [Checkpoints(folder)]
        return AlignmentLoop(objective, sampler, reward, prompts, prompts_per_step=4, hooks=hooks, devices=devices)

    def work(devices):
        calls = []

        def reward(images, prompts):
            calls.append(len(images))
            if devices.rank == failing and len(calls) == 3:
                if value is None:
                    raise ConnectionError("503")
                return torch.full((len(images),), float(value))
            return channel_reward(images, prompts)

        with pytest.raises(kind):
            loop(devices, reward).advance(4)
        return len(calls)

    assert Meeting().run(work) == {0: 3, 1: 3}
    assert [path.name for path in complete_checkpoints(folder)] == ["step-000002"]
    assert len(torch.load(folder / "step-000002" / "state.pt")["generators"]) == 2
    whole, resumed = tmp_path / "whole", {}

    def go_on(devices):
        again = loop(devices, channel_reward)
        again.advance(4, again.hooks[0].restore(again))
        resumed[devices.rank] = again

    def undisturbed(devices):
        run = loop(devices, channel_reward)
        run.hooks = [Checkpoints(whole)]
        run.advance(4)

    assert Meeting().run(go_on) == Meeting().run(undisturbed) == {0: None, 1: None}
    assert equal(folder, whole)


class TwoPartError(RewardError):
    """An error of a user's own, which is not made of a text."""

    def __init__(self, server, code):
        super().__init__(f"{server} answered {code}")
        self.code = code


class Asks(Hook):
    """Asks a judge at the second step, which is away."""

    def step(self, loop, report):
        if report.step == 1:
            raise TwoPartError("judge", 503)


def test_an_error_of_ones_own_stays_what_it_is_and_loses_no_step():
    loop = AlignmentLoop(SoftmaxTB(TinyPolicy()), ChainSampler(3, 2), channel_reward, Prompts(["one"]), prompts_per_step=1, hooks=[Asks()])
    with pytest.raises(TwoPartError, match="in the evaluation at step 2, Asks: judge answered 503; the last checkpoint is") as caught:
        loop.run(3, folder="own", show=False)
    assert caught.value.code == 503
    assert steps("own")[-1] == 1
    assert [path.name for path in complete_checkpoints(Path("own"))] == ["step-000002"]


def test_the_batch_of_a_reward_that_is_no_number_is_kept():
    loop = AlignmentLoop(
        SoftmaxTB(TinyPolicy()),
        ChainSampler(3, 2),
        lambda images, prompts: channel_reward(images, prompts) * float("nan"),
        Prompts(["one"]),
    )
    with pytest.raises(NonFiniteRewardError, match="there is no checkpoint") as caught:
        loop.run(3, folder="own", show=False)
    assert caught.value.evidence is not None


def test_a_checkpoint_that_cannot_be_saved_then_is_told(monkeypatch):
    loop = AlignmentLoop(SoftmaxTB(TinyPolicy()), ChainSampler(3, 2), channel_reward, Prompts(["one"]), prompts_per_step=1, hooks=[Asks()])

    def full(*args, **kwargs):
        raise CheckpointError("no space left")

    monkeypatch.setattr(Checkpoints, "_save", full)
    with pytest.raises(TwoPartError, match="there is no checkpoint in own yet\nthen, while stopping: CheckpointError: no space left"):
        loop.run(3, folder="own", show=False)
