"""What is spread, and how processes keep their calls in step, as far as one process can tell."""

import copy

import pytest
import torch
from torch import nn

from diffalign.core import Prompt, SingleProcess, agree
from diffalign.core.errors import BrokenCallError
from diffalign.core.forking import view_of
from diffalign.core.policy import RowCounter
from diffalign.core.processes import together
from diffalign.core.spread import is_spread, local, spread_like, whole
from diffalign.policies import NetworkPolicy
from diffalign.processes.lockstep import AnnouncedCalls
from diffalign.processes.sharding import FullySharded, blocks, separate, sharded_bytes, shared_modules
from diffalign.testing import TinyPolicy


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.start = nn.Linear(4, 6)
        self.middle = nn.Sequential(nn.ModuleList([nn.Linear(6, 6), nn.ModuleList([nn.Linear(6, 6), nn.Tanh()])]))
        self.end = nn.Linear(6, 3)


def numbers(modules):
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def test_the_blocks_of_a_network_are_the_entries_of_its_lists():
    network = Listed()
    outer = network.middle[0]
    assert list(blocks(network)) == [outer[0], outer[1][0]]
    outer[0].weight = network.middle[0][1][0].weight
    assert list(blocks(network)) == []  # tied weights must be gathered together


def test_all_weights_are_spread_where_all_are_trained_and_the_shared_ones_where_adapters_are():
    full = NetworkPolicy(Listed(), (3,))
    roles = {"policy": full, "reference": full.fork()}
    assert list(separate(roles)) == list(roles.values())
    assert list(shared_modules(roles)) == []
    assert sharded_bytes(roles) == 4 * numbers(roles.values())
    adapted = TinyPolicy()
    roles = {"policy": adapted, "reference": adapted.fork()}
    assert list(separate(roles)) == []
    assert sharded_bytes(roles) == 4 * numbers([adapted.network.body])


def test_a_policy_under_two_names_is_spread_once():
    frozen = NetworkPolicy(Listed(), (3,)).fork()
    roles = {"teacher": frozen, "reference": frozen}
    assert list(separate(roles)) == [frozen]
    assert list(shared_modules(roles)) == []


def test_one_process_cannot_spread_anything():
    with pytest.raises(ValueError, match="sharding needs several processes; this is one"):
        FullySharded().shard({"policy": TinyPolicy()}, SingleProcess())


def test_a_whole_tensor_is_its_own_part():
    tensor = torch.arange(3.0)
    assert not is_spread(tensor)
    assert local(tensor).data_ptr() == whole(tensor).data_ptr() == tensor.data_ptr()
    assert spread_like(tensor, tensor) is tensor


def test_a_view_of_a_policy_is_announced_and_keeps_its_own_attributes():
    policy = TinyPolicy()
    calls, told = [], AnnouncedCalls._tell

    class Told(AnnouncedCalls):
        def _tell(self, mine):
            calls.append(mine)
            return told(self, mine)

    Told.over({"policy": policy}, SingleProcess(), [])
    view = view_of(policy, counter=RowCounter())
    condition, latents = policy.encode([Prompt("a")]), torch.zeros(1, 3)
    with torch.no_grad():
        expected = TinyPolicy().velocity(latents, torch.ones(1), condition)
        assert torch.equal(view.velocity(latents, torch.ones(1), condition), expected)
    assert calls == [1]
    assert (view.counter.rows, policy.counter.rows) == (1, 0)
    assert isinstance(policy, TinyPolicy)


class Deaf(SingleProcess):
    """Processes of which nobody may speak."""

    def maximum(self, values):
        raise AssertionError("the others wait in another collective")

    gather = sum = maximum


def test_an_error_inside_a_collective_is_told_to_nobody():
    error = BrokenCallError("no memory")
    with pytest.raises(BrokenCallError, match="no memory"):
        agree(Deaf(size=2), error)
    with pytest.raises(BrokenCallError, match="no memory"), together(Deaf(size=2), AnnouncedCalls(Deaf(size=2), ())):
        raise copy.copy(error)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("no memory"), r"process 0 of 1 ran out of memory in a call of 1 rows: no memory\n.*smaller --sampler.rows"),
        (ValueError("odd"), r"process 0 of 1 failed in a call of 1 rows, .*: odd\nEither this process has failed, or another one "),
    ],
)
def test_what_fails_inside_a_call_says_what_to_do(error, said):
    policy = TinyPolicy()

    def forward(inputs):
        raise error

    policy.network.forward = forward
    AnnouncedCalls.over({"policy": policy}, SingleProcess(), [])
    with pytest.raises(BrokenCallError, match=said):
        policy.velocity(torch.zeros(1, 3), torch.ones(1), policy.encode([Prompt("a")]))
