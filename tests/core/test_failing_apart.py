"""One process fails, or each in its own way: all raise the same kind of error, and nobody waits for the others."""

import threading

import pytest
import torch
from meeting import Meeting

from diffalign import AlignmentLoop
from diffalign.cli import main
from diffalign.commands import parts
from diffalign.core import CheckpointError, NonFiniteRewardError, ProcessError, Progress, RewardError, UpdateError
from diffalign.core.processes import agree
from diffalign.core.undo import Undo
from diffalign.objectives import SoftmaxTB
from diffalign.prompts import Prompts
from diffalign.samplers import FixedPlan, TreeSampler
from diffalign.testing import TinyPolicy, channel_reward


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ([None, RewardError("black")], RewardError),
        ([torch.OutOfMemoryError("full"), RewardError("black")], torch.OutOfMemoryError),
        ([RewardError("black"), ValueError("odd")], RewardError),
        ([None, CheckpointError("half a file")], CheckpointError),
        ([OSError("no space"), None], OSError),
        ([None, UpdateError("memory ran out")], UpdateError),
        ([ProcessError("gone"), OSError("no space")], OSError),
        ([CheckpointError("half a file"), RewardError("black")], RewardError),
        ([UpdateError("memory ran out"), torch.OutOfMemoryError("full")], UpdateError),
        ([None, NonFiniteRewardError("nan")], NonFiniteRewardError),
        ([RewardError("black"), NonFiniteRewardError("nan")], NonFiniteRewardError),
        ([KeyError("a"), TypeError("b")], RuntimeError),
    ],
)
def test_all_processes_raise_the_worst_kind(errors, expected):
    found = Meeting().run(lambda devices: agree(devices, errors[devices.rank]))
    worst = next(rank for rank, error in enumerate(errors) if isinstance(error, expected) or expected is RuntimeError)
    for rank, error in found.items():
        if expected is not RuntimeError:  # the kind of an error that is none of those that are known
            assert type(error) is expected
        if rank != worst and errors[rank] is None:
            assert str(error) == f"process {worst} of 2: {errors[worst]}"


@pytest.mark.parametrize("kind", [UpdateError, CheckpointError, OSError])
def test_advice_is_one_message_in_every_process(kind, monkeypatch, capsys):
    found = Meeting().run(lambda devices: agree(devices, kind("full; make room") if devices.rank == 0 else None))
    for rank, text in enumerate(("full; make room", "process 0 of 2: full; make room")):

        def fails(options, overrides, error=found[rank]):
            raise error

        monkeypatch.setattr(parts, "run", fails)
        assert main(["parts"]) == 1
        assert capsys.readouterr().err == f"error: {text}\n"


def test_where_one_process_runs_out_of_memory_all_repeat_the_step():
    def work(devices):
        errors = [torch.OutOfMemoryError("full"), RewardError("black")]
        with pytest.raises(torch.OutOfMemoryError) as caught:
            agree(devices, errors[devices.rank])
        return str(caught.value), caught.value.__cause__

    found = Meeting().run(work)
    assert found[0] == ("full", None)
    assert found[1][0] == "process 0 of 2: full"
    assert str(found[1][1]) == "black"  # what went wrong here is not lost


def test_memory_that_runs_out_in_one_process_before_the_first_phase_stops_all(monkeypatch):
    here, remember = threading.local(), Undo.remember.__func__

    def short(cls, *given):
        if here.rank == 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return remember(cls, *given)

    monkeypatch.setattr(Undo, "remember", classmethod(short))

    def work(devices):
        here.rank = devices.rank
        sampler, prompts = TreeSampler(5, FixedPlan((1, 2)), rows=5), Prompts(list("abcd"))
        objective = SoftmaxTB(TinyPolicy(), updates=2, rows=3)
        loop = AlignmentLoop(objective, sampler, channel_reward, prompts, prompts_per_step=4, devices=devices)
        before = [parameter.clone() for parameter in objective.policy.parameters()]
        with pytest.raises(RuntimeError, match=r"(?s)CUDA out of memory.*copied, .* Nothing was updated\. Train fewer weights") as caught:
            loop.step(loop.prompts.draw(0, 4), Progress(0, 4))
        assert all(map(torch.equal, before, objective.policy.parameters()))
        return type(caught.value)

    assert Meeting().run(work) == {0: UpdateError, 1: UpdateError}


def test_memory_that_runs_out_while_one_optimizer_steps_stops_all_with_what_to_do():
    class Full(torch.optim.SGD):
        def step(self, closure=None):
            raise torch.OutOfMemoryError("CUDA out of memory")

    def work(devices):
        objective = SoftmaxTB(TinyPolicy(), rows=3)
        optimizer = Full if devices.rank == 0 else torch.optim.SGD
        loop = AlignmentLoop(
            objective,
            TreeSampler(5, FixedPlan((1, 2)), rows=5),
            channel_reward,
            Prompts(list("abcd")),
            prompts_per_step=4,
            optimizers={"policy": lambda parameters: optimizer(parameters, lr=0.1)},
            devices=devices,
        )
        with pytest.raises(UpdateError, match=r"(?s)CUDA out of memory.*the optimizer of 'policy' stepped.*Continue .* by --resume"):
            loop.step(loop.prompts.draw(0, 4), Progress(0, 4))
        return True

    assert Meeting().run(work) == {0: True, 1: True}
