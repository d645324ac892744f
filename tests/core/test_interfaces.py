"""What can be exchanged, and the defaults of one process."""

import pytest
import torch

from diffalign.core import (
    Aggregation,
    Budgeted,
    Devices,
    Hook,
    Listed,
    Objective,
    Phase,
    Planned,
    Reward,
    Scalar,
    SingleProcess,
    TrajectorySampler,
)
from diffalign.core.budget import rows_of
from diffalign.objectives import SoftmaxTB
from diffalign.prompts import PromptFile, Prompts
from diffalign.samplers import Branches, ChainSampler, DrawnSteps, TreeSampler
from diffalign.testing import TinyPolicy


@pytest.mark.parametrize("kind", [TrajectorySampler, Reward, Aggregation, Objective, Scalar, Devices])
def test_interfaces_cannot_be_built(kind):
    with pytest.raises(TypeError, match=r"abstract|Protocols"):
        kind()


def test_an_objective_has_defaults_for_everything_but_its_phases():
    policy, critic = TinyPolicy(), TinyPolicy()

    class Mine(Objective):
        def __init__(self):
            self.policy = policy

        def phases(self):
            return (Phase({"policy": policy}, lambda batch, update: iter(())), Phase({"critic": critic}, lambda batch, update: iter(())))

    mine = Mine()
    assert mine.behavior() is policy
    assert mine.policies() == {"policy": policy, "critic": critic}
    assert mine.after_update("policy") is None
    assert mine.after_step() is None


def test_a_phase_repeats_at_least_once():
    with pytest.raises(ValueError, match="repeats"):
        Phase({}, lambda batch, update: iter(()), repeats=0)


def test_one_process_is_its_own_sum():
    devices, values = SingleProcess(), torch.tensor([1.0, 2.0])
    parameter = torch.nn.Parameter(values.clone())
    parameter.sum().backward()
    devices.sum_gradients([parameter])
    devices.barrier()
    assert (devices.rank, devices.size) == (0, 1)
    assert devices.sum(values) is devices.maximum(values) is devices.gather(values) is values
    assert parameter.grad.tolist() == [1.0, 1.0]


def test_parts_declare_what_they_can_do(tmp_path):
    (tmp_path / "prompts.txt").write_text("a prompt\n")

    class Plain(TrajectorySampler):
        def sample(self, policy, condition, progress, streams):
            raise NotImplementedError

    tree, chain, drawn = TreeSampler(5, rows=7), ChainSampler(), DrawnSteps([1, 2])
    assert [isinstance(sampler, Branches) for sampler in (tree, chain, drawn, Plain())] == [True, True, True, False]
    assert [isinstance(sampler, Planned) for sampler in (tree, chain, drawn, Plain())] == [True, False, False, False]
    assert [isinstance(part, Budgeted) for part in (tree, SoftmaxTB(TinyPolicy()), Plain())] == [True, True, False]
    assert [rows_of(part) for part in (tree, chain, SoftmaxTB(TinyPolicy(), rows=3), Plain())] == [7, None, 3, None]
    assert [isinstance(source, Listed) for source in (Prompts(["a"]), PromptFile(str(tmp_path / "prompts.txt")), object())] == [
        True,
        True,
        False,
    ]


def test_a_hook_watches_nothing_unless_told_to():
    hook = Hook()
    assert hook.start(None, 0, 1) is hook.step(None, None) is hook.stop(None, 1, None) is None
