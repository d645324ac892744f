"""One process fails, or each in its own way: all raise the same kind of error, and nobody waits for the others."""

import threading

import pytest
import torch
from meeting import Meeting

from diffalign import AlignmentLoop
from diffalign.core import Progress, RewardError
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
        ([KeyError("a"), OSError("b")], RuntimeError),
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

    assert Meeting().run(work) == {0: RuntimeError, 1: RuntimeError}
