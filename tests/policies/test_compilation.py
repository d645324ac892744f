"""Compilation: few graphs for all blocks, forks and numbers of rows; equal numbers; a refusal of torch ends nothing."""

import copy

import pytest
import torch
from diffusers import ModelMixin
from diffusers.loaders import PeftAdapterMixin
from torch import nn
from torch._dynamo import register_backend
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from diffalign.core import fork_module
from diffalign.core.forking import view_of
from diffalign.policies import Compilation, LoRA
from diffalign.policies.compilation import compiled
from diffalign.policies.left_out import LeftOut, switch

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
TREE = (1, 3, 9, 27, 2)
"""Rows of the calls of a rollout, and of a piece of an update."""


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, hidden, shift):
        return hidden + self.down(torch.nn.functional.silu(self.up(hidden + shift[:, None])))


class Network(ModelMixin, PeftAdapterMixin):
    _repeated_blocks = ("Block",)

    def __init__(self, blocks=5):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.checkpointing = False

    def forward(self, hidden, shift):
        for block in self.blocks:
            hidden = checkpoint(block, hidden, shift, use_reentrant=False) if self.checkpointing else block(hidden, shift)
        return hidden


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def network(blocks=5):
    torch.manual_seed(0)
    made = Network(blocks)
    LoRA(rank=2).attach(made, ("up", "down"))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return made


def own(made):
    return [name for name, _ in made.named_parameters() if "lora_" in name]


def call(made, rows):
    drawn = torch.Generator().manual_seed(rows)
    return made(torch.randn(rows, 6, 4, generator=drawn), torch.randn(rows, 4, generator=drawn))


def gradients(made, rows):
    call(made, rows).square().sum().backward()
    found = {name: parameter.grad for name, parameter in made.named_parameters() if parameter.grad is not None}
    made.zero_grad(set_to_none=True)
    return found


def pristine(made):
    twin = fork_module(made, own(made), trainable=False)
    assert LeftOut.of(twin, [parameter for name, parameter in twin.named_parameters() if "lora_B" in name], trained=False)
    return twin


def graphs():
    return counters["stats"]["unique_graphs"]


def test_graphs_grow_neither_with_blocks_nor_with_rows_nor_with_forks():
    """One graph for each state of weights and gradients. One row is compiled apart, and only where gradients are on."""
    blocks = 4
    plain, made = network(blocks), network(blocks)
    Compilation(backend="eager").apply(made)
    frozen, trained, bare = fork_module(made, own(made), trainable=False), fork_module(made, own(made), trainable=True), pristine(made)
    expected = 0
    for each, new in ((made, 1), (trained, 0), (frozen, 1), (bare, 1)):
        expected += new
        with torch.no_grad():
            for rows in TREE:
                reference = pristine(plain) if each is bare else plain
                torch.testing.assert_close(call(each, rows), call(reference, rows))
        assert graphs() == expected
    for each, new in ((made, 2), (trained, 0)):
        expected += new
        for rows in TREE:
            mine, theirs = gradients(each, rows), gradients(plain, rows)
            assert mine.keys() == theirs.keys()
            assert len(mine) == 4 * blocks
            for name, gradient in mine.items():
                torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-5)
        assert graphs() == expected
    with torch.no_grad():
        for each in (fork_module(made, own(made), trainable=False), fork_module(trained, own(made), trainable=True), pristine(trained)):
            call(each, 18)
    assert graphs() == 5
    assert not counters["graph_break"]


def test_a_block_like_no_other_runs_as_it_is():
    plain, made = network(3), network(3)
    for each in (plain, made):
        each.blocks[2].up = nn.Sequential(each.blocks[2].up)
    Compilation(backend="eager").apply(made)
    assert [compiled(block) for block in made.blocks] == [True, True, False]
    with torch.no_grad():
        torch.testing.assert_close(call(made, 3), call(plain, 3))
    assert graphs() == 1


def test_a_block_whose_input_carries_a_gradient_is_compiled_first_or_not():
    """As where an embedding is trained: then no block differs from the others."""
    plain, made = network(2), network(2)
    Compilation(backend="eager").apply(made)
    drawn = torch.Generator().manual_seed(0)
    hidden, shift = torch.randn(3, 6, 4, generator=drawn).requires_grad_(), torch.randn(3, 4, generator=drawn)
    found = [torch.autograd.grad(each(hidden, shift).square().sum(), hidden)[0] for each in (made, plain)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert graphs() == 1


def test_without_symbols_each_number_of_rows_is_compiled():
    made = network(2)
    Compilation(backend="eager", dynamic=False).apply(made)
    with torch.no_grad():
        for rows in (2, 3, 4):
            call(made, rows)
    assert graphs() == 3


def test_an_adapter_that_is_switched_on_again_is_computed():
    plain, made = network(2), network(2)
    Compilation(backend="eager").apply(made)
    with torch.no_grad():
        for on in (True, False, True):
            switch(made, on=on)
            switch(plain, on=on)
            torch.testing.assert_close(call(made, 3), call(plain, 3))
    assert graphs() == 2


def test_recomputed_activations_have_the_same_gradients():
    plain, made = network(2), network(2)
    Compilation(backend="aot_eager").apply(made)
    made.checkpointing = True
    for rows in (2, 3):
        mine, theirs = gradients(made, rows), gradients(plain, rows)
        assert mine.keys() == theirs.keys()
        for name, gradient in mine.items():
            torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-5)
    assert graphs() == 1


def test_a_copy_calls_its_own_weights():
    made = network(2)
    Compilation(backend="eager").apply(made)
    twin = fork_module(made, own(made), trainable=False)
    with torch.no_grad():
        before = call(made, 3)
        for parameter in twin.parameters():
            if parameter.shape == (2, 4):
                parameter.zero_()
        assert not torch.equal(call(twin, 3), before)
        assert torch.equal(call(made, 3), before)


@register_backend(name="refuses")
def refuses(graph, inputs):
    raise RuntimeError("no compiler on this machine")


@register_backend(name="runs_out_of_memory")
def runs_out_of_memory(graph, inputs):
    raise torch.OutOfMemoryError("too many rows")


def _refuse_backward(graph, inputs):
    raise RuntimeError("no kernel for this gradient")


register_backend(aot_autograd(fw_compiler=lambda graph, inputs: graph, bw_compiler=_refuse_backward), name="refuses_backward")


@pytest.mark.parametrize(("backend", "reason"), [("refuses", "no compiler on this machine"), ("refuses_backward", "no kernel for this")])
def test_a_refusal_of_torch_is_said_once_and_the_run_goes_on(backend, reason, capsys):
    plain, made = network(2), network(2)
    Compilation(backend=backend).apply(made)
    twin = fork_module(made, own(made), trainable=True)
    for rows in (2, 3, 2):
        for each in (made, twin):
            mine, theirs = gradients(each, rows), gradients(plain, rows)
            assert all(torch.equal(mine[name], gradient) for name, gradient in theirs.items())
    said = capsys.readouterr().err.splitlines()
    assert len([line for line in said if "torch cannot compile Block, which runs as it is from here on" in line]) == 1
    assert reason in "".join(said)


def test_memory_that_runs_out_while_compiling_is_the_loops_to_handle(capsys):
    made = network(2)
    Compilation(backend="runs_out_of_memory").apply(made)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError, match="too many rows"):
            call(made, 2)
    assert "cannot compile" not in capsys.readouterr().err


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"Compilation\.backend must be one of .*inductor.*; got 'fastest'"):
        Compilation(backend="fastest").apply(network(1))


def test_on_the_meta_device_nothing_is_compiled():
    made = network(2)
    Compilation(backend="eager").apply(made)
    meta = copy.deepcopy(made).to("meta")
    assert meta(torch.zeros(3, 6, 4, device="meta"), torch.zeros(3, 4, device="meta")).shape == (3, 6, 4)
    assert graphs() == 0


def test_a_view_is_compiled_like_its_module():
    made = network(1)
    Compilation(backend="eager").apply(made)
    assert compiled(view_of(made).blocks[0])
    assert not compiled(network(1).blocks[0])


def parts(policy):
    return {path for path, module in policy.network.named_modules() if compiled(module)}


@pytest.mark.parametrize(
    ("name", "scope", "expected"),
    [
        ("flux-dev", "blocks", {"transformer_blocks.0", "single_transformer_blocks.0"}),
        ("sd3", "blocks", {"transformer_blocks.0", "transformer_blocks.1"}),
        ("sana", "network", {""}),
    ],
)
def test_every_fork_is_compiled(load, name, scope, expected):
    policy = load(name, compilation=Compilation(scope, backend="eager"))
    for each in (policy, policy.fork(trainable=True), policy.fork().fork(pristine=True)):
        assert parts(each) == expected
        assert all(module.forward.__self__ is module for module in each.network.modules() if compiled(module))


@pytest.mark.parametrize(("before", "after"), [(8, 64), (100, 100)])
def test_many_variants_stay_compiled(before, after):
    from diffalign.policies.compilation import _program

    _program.cache_clear()
    with torch._dynamo.config.patch(recompile_limit=before):
        Compilation("blocks", backend="eager").apply(network(1))
        assert torch._dynamo.config.recompile_limit == after


def test_a_compiled_fork_gives_the_same_velocity(load):
    policy = load("flux-dev", compilation=Compilation("blocks", backend="eager"))
    condition = policy.encode(["a red cube", "two green cats"])
    latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        velocities = [each.velocity(latents, policy.sigmas(4)[[1, 2]], condition) for each in (policy.fork(), load("flux-dev"))]
    torch.testing.assert_close(*velocities, rtol=1e-4, atol=1e-5)
    assert graphs() == 2


def test_blocks_are_compiled_where_there_are_some():
    with pytest.raises(ValueError, match="needs repeated blocks, and Linear has none; take 'network'"):
        Compilation().apply(torch.nn.Linear(1, 1))
