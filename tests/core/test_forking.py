"""A fork owns what it trains and shares everything else as the very same objects."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffalign.core import fork_module


class Block(nn.Module):
    """A frozen linear layer, a low-rank delta of its own, a scale on the block itself and a buffer."""

    def __init__(self, checkpointing=False):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)
        self.delta = nn.Linear(3, 3, bias=False)
        self.gain = nn.Parameter(torch.ones(3))
        self.register_buffer("offset", torch.ones(3))
        self.checkpointing = checkpointing

    def forward(self, x):
        if self.checkpointing:
            return checkpoint(self._inner, x, use_reentrant=False)
        return self._inner(x)

    def _inner(self, x):
        return torch.tanh(self.norm(self.linear(x)) + self.delta(x)) * self.gain + self.offset


def network(checkpointing=False):
    torch.manual_seed(0)
    return nn.Sequential(Block(checkpointing), Block(checkpointing)).double()


OWN = {"0.delta.weight", "1.delta.weight", "1.gain"}
X = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)


def gradients(module, x=X):
    module.zero_grad(set_to_none=True)
    module(x).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters() if parameter.grad is not None}


def test_a_fork_owns_what_it_is_told_and_shares_the_rest_by_identity():
    base = network()
    twin = fork_module(base, OWN, trainable=False)
    mine, theirs = dict(base.named_parameters()), dict(twin.named_parameters())
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert (mine[name] is not theirs[name]) == (name in OWN)
        assert torch.equal(mine[name], theirs[name])
    for name, buffer in base.named_buffers():
        assert dict(twin.named_buffers())[name] is buffer


def test_submodules_that_own_nothing_are_shared_as_modules():
    base = network()
    twin = fork_module(base, OWN, trainable=False)
    assert twin[0].linear is base[0].linear
    assert twin[1].norm is base[1].norm
    assert twin[0] is not base[0]
    assert twin[0].delta is not base[0].delta


@pytest.mark.parametrize("trainable", [True, False])
def test_only_owned_tensors_become_trainable(trainable):
    base = network().requires_grad_(False)
    base[0].delta.weight.requires_grad_(True)
    base(X).sum().backward()
    twin = fork_module(base, OWN, trainable=trainable)
    assert {name for name, parameter in twin.named_parameters() if parameter.requires_grad} == (OWN if trainable else set())
    assert {name for name, parameter in base.named_parameters() if parameter.requires_grad} == {"0.delta.weight"}
    assert all(parameter.grad is None for parameter in twin.parameters() if parameter.requires_grad)
    assert base[0].delta.weight.grad is not None


def test_forks_compute_the_same_until_one_moves_and_then_only_that_one():
    base = network()
    twin = fork_module(base, OWN, trainable=True)
    third = fork_module(twin, OWN, trainable=True)
    before = base(X).detach()
    assert torch.equal(twin(X), before)
    assert torch.equal(third(X), before)
    with torch.no_grad():
        twin[1].gain += 1
    assert not torch.equal(twin(X), before)
    assert torch.equal(base(X), before)
    assert torch.equal(third(X), before)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_interleaved_forks_are_those_of_each_alone(checkpointing):
    base = network(checkpointing)
    base.requires_grad_(False)
    forks = [fork_module(base, OWN, trainable=True) for _ in range(2)]
    with torch.no_grad():
        forks[1][0].delta.weight += 0.5
    alone = [gradients(fork) for fork in forks]
    for fork in forks:
        fork.zero_grad(set_to_none=True)
    losses = [fork(X).square().sum() for fork in forks]  # both graphs stand, and under checkpointing both recompute
    for loss in losses:
        loss.backward()
    for fork, expected in zip(forks, alone, strict=True):
        assert expected.keys() == OWN
        for name, gradient in expected.items():
            assert torch.equal(dict(fork.named_parameters())[name].grad, gradient)
    assert all(parameter.grad is None for parameter in base.parameters())


def test_tied_weights_stay_tied_in_the_fork_and_apart_from_the_original():
    base = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    base[1].weight = base[0].weight
    twin = fork_module(base, {"0.weight"}, trainable=True)
    assert twin[1].weight is twin[0].weight
    assert twin[1].weight is not base[0].weight
    assert twin[1].bias is base[1].bias


def test_mode_and_hooks_are_kept():
    base, calls = network().eval(), []
    base[0].register_forward_hook(lambda *_: calls.append(1))
    twin = fork_module(base, OWN, trainable=False)
    assert not twin.training
    twin(X)
    assert calls == [1]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_compiled_network_is_compiled_again():
    base = network()
    base.compile()
    assert fork_module(base, OWN, trainable=False)._compiled_call_impl is not None
    assert fork_module(network(), OWN, trainable=False)._compiled_call_impl is None


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"own must name parameters of Sequential; it has no '7.gain'"):
        fork_module(network(), {"0.delta.weight", "7.gain"}, trainable=False)
