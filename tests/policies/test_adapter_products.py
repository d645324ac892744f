"""Adapters above a base in bfloat16: masters in float32, products in bfloat16; forks without a delta do not compute them."""

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from diffalign import AlignmentLoop, Prompt
from diffalign.core import Edges, Guided, Progress, Streams, check_first_step, replay
from diffalign.costs.rows import innermost
from diffalign.export import export
from diffalign.objectives import DGPO, DiffusionNFT, FlowGRPO, GroupForwardKL, SoftmaxTB
from diffalign.policies import FlowMatchingPolicy, LoRA
from diffalign.policies.lora import ADAPTER
from diffalign.prompts import Prompts
from diffalign.samplers import Branching, TreeSampler
from diffalign.testing import GivenPlan, channel_reward

PROMPTS = [Prompt("a red cube"), Prompt("two green cats")]
TREE = TreeSampler(4, GivenPlan(Branching((1, 2, 2, 1), (0.0, 0.7, 0.7, 0.0))))
FAMILIES = ("sd3", "flux-dev", "flux2-klein", "z-image", "qwen-image", "sana", "sd15", "sdxl")


class Products(TorchDispatchMode):
    """Counts matrix products by the type of their factors."""

    def __init__(self):
        super().__init__()
        self.types = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_", "bmm", "linear"):
            self.types.append(arguments[-1].dtype)
        return function(*arguments, **(keywords or {}))


def filled(policy):
    """Adapters that say something, equal in all policies."""
    drawn = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.network.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=drawn))
    return policy


def as_peft_computes(policy):
    """The same weights, as they were computed before: every product of an adapter in float32."""
    for module in policy.network.modules():
        if hasattr(module, "lora_variant"):
            module.lora_variant.pop(ADAPTER, None)
            module.cast_input_dtype_enabled = True
    return policy


def velocity(policy):
    latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    return policy.velocity(latents, policy.sigmas(4)[[1, 2]], policy.encode(PROMPTS))


def products(policy):
    """The types of the denoiser's matrix products."""
    policy.encode(PROMPTS)  # kept from here on
    with Products() as counted, torch.no_grad():
        velocity(policy)
    return counted.types


def count(policy):
    return len(products(policy))


def gradients(policy):
    result = velocity(policy)
    result.square().mean().backward()
    return result.detach(), {
        name: parameter.grad for name, parameter in policy.trainable_parameters().items() if parameter.grad is not None
    }


def error(one, other):
    return float((one.double() - other.double()).norm() / other.double().norm())


def require_equal_to_rounding(new, old, exact):
    """As near to the same network in float32 as it was with adapters in float32: these networks are small, and round coarsely."""
    (mine, my_gradients), (theirs, their_gradients), (right, right_gradients) = map(gradients, (new, old, exact))
    assert not torch.equal(mine, theirs)
    assert error(mine, right) < 1.25 * error(theirs, right) + 2**-8
    assert my_gradients.keys() == their_gradients.keys() == right_gradients.keys()
    assert {gradient.dtype for gradient in my_gradients.values()} == {torch.float32}
    whole = [torch.cat([of[key].flatten() for key in sorted(of)]) for of in (my_gradients, their_gradients, right_gradients)]
    assert error(whole[0], whole[2]) < 1.5 * error(whole[1], whole[2]) + 2**-7


@pytest.mark.parametrize("name", FAMILIES)
def test_they_are_those_of_float32_within_the_rounding_of_bfloat16(load, name):
    require_equal_to_rounding(
        filled(load(name, dtype="bfloat16")), as_peft_computes(filled(load(name, dtype="bfloat16"))), filled(load(name))
    )


def test_one_layer_is_exact_to_a_rounding(load):
    policy = filled(load("sd3", dtype="bfloat16"))
    name, layer = next((name, module) for name, module in policy.network.named_modules() if name.endswith("attn.to_q"))
    inputs = torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    down, up = (factors[ADAPTER].weight.detach().double() for factors in (layer.lora_A, layer.lora_B))
    base = layer.base_layer(inputs).detach().double()
    result = layer(inputs)
    expected = base + layer.scaling[ADAPTER] * (inputs.detach().double() @ down.T @ up.T)
    assert result.dtype == torch.bfloat16
    assert error(result.detach(), expected) < 2**-7
    result.double().square().sum().backward()
    given = 2 * result.detach().double()
    inner = inputs.detach().double() @ down.T
    wanted = layer.scaling[ADAPTER] * torch.einsum("bto,btr->or", given, inner)
    assert error(layer.lora_B[ADAPTER].weight.grad, wanted) < 2**-6, name
    assert inputs.grad is not None


def test_no_product_is_left_in_float32(load):
    policy = filled(load("sd3", dtype="bfloat16"))
    layers = sum("lora_A" in key for key in policy.trainable_parameters())
    base, new = products(policy.fork(pristine=True)), products(policy)
    assert base.count(torch.float32) == new.count(torch.float32)
    assert len(new) - len(base) == 2 * layers
    policy.encode(PROMPTS)
    with Products() as counted:
        gradients(policy)
    assert counted.types.count(torch.float32) == base.count(torch.float32)  # frozen layers of one vector a row, without gradient
    old = products(as_peft_computes(policy))
    assert old.count(torch.float32) - base.count(torch.float32) == 2 * layers


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_above_other_types_peft_computes_as_ever(load, dtype):
    policy = load("sd3", dtype=dtype)
    layers = [module for module in policy.network.modules() if hasattr(module, "lora_variant")]
    assert layers
    assert not any(layer.lora_variant for layer in layers)
    assert all(layer.cast_input_dtype_enabled for layer in layers)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_above_a_quantised_base_too(load, kind):
    pytest.importorskip("bitsandbytes", reason="needs pip install 'diffalign[quantized]'")
    policy = filled(load("sd3", quantization=kind, dtype="bfloat16"))
    require_equal_to_rounding(
        policy, as_peft_computes(filled(load("sd3", quantization=kind, dtype="bfloat16"))), filled(load("sd3", quantization=kind))
    )
    counted, before = products(policy), products(as_peft_computes(policy))
    layers = sum("lora_A" in key for key in policy.trainable_parameters())
    assert before.count(torch.float32) - counted.count(torch.float32) == 2 * layers


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_replay_is_the_rollout_and_checkpointing_changes_no_gradient(load, checkpointing):
    policy = filled(load("sd3", dtype="bfloat16", checkpointing=checkpointing))
    with torch.no_grad():
        forest = TREE.sample(policy, policy.encode(PROMPTS), Progress(0, 1), Streams(3))
    assert check_first_step(policy, forest).deviation == 0.0

    def of(some):
        replay(some, forest, Edges.of(forest)).mean.square().sum().backward()
        return [parameter.grad for parameter in some.trainable_parameters().values()]

    for one, other in zip(of(policy), of(filled(load("sd3", dtype="bfloat16"))), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["sd3", "flux-dev"])
def test_a_pass_with_gradients_gives_the_bits_of_one_without(load, name):
    policy = filled(load(name, dtype="bfloat16"))
    with torch.no_grad():
        expected = velocity(policy)
    assert torch.equal(velocity(policy).detach(), expected)


def test_names_are_the_plain_ones_and_merged_weights_are_those_of_peft(load, tmp_path):
    new, old = filled(load("sd3", dtype="bfloat16")), as_peft_computes(filled(load("sd3", dtype="bfloat16")))
    assert list(new.state_dict()) == list(old.state_dict())
    for policy, place in ((new, "new"), (old, "old")):
        export(policy, tmp_path / place, "diffusers")
    files = [load_file(tmp_path / place / "pytorch_lora_weights.safetensors") for place in ("new", "old")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    for policy in (new, old):
        policy.network.fuse_lora()
    merged = [dict(policy.network.named_parameters()) for policy in (new, old)]
    assert all(torch.equal(merged[0][name], merged[1][name]) for name in merged[0])
    new.network.unfuse_lora()
    old.network.unfuse_lora()
    back = [dict(policy.network.named_parameters()) for policy in (new, old)]
    assert all(torch.equal(back[0][name], back[1][name]) for name in back[0])


def test_forks_compute_alike(load):
    policy = filled(load("sd3", dtype="bfloat16"))
    with torch.no_grad():
        expected = velocity(policy)
        for fork in (policy.fork(), policy.fork(trainable=True), policy.fork().fork(trainable=True)):
            assert torch.equal(velocity(fork), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fork_without_a_delta_pays_nothing_for_its_adapters(load, dtype):
    policy = filled(load("sd3", dtype=dtype))
    layers = sum("lora_A" in key for key in policy.trainable_parameters())
    reference, trained = policy.fork(pristine=True), policy.fork(pristine=True, trainable=True)
    assert count(policy) == count(trained) == count(reference) + 2 * layers
    with torch.no_grad():
        assert torch.equal(velocity(reference), velocity(trained))
    assert reference.own_parameters().keys() == policy.own_parameters().keys()
    assert not reference.trainable_parameters()
    assert trained.trainable_parameters().keys() == policy.trainable_parameters().keys()
    assert count(policy.fork()) == count(policy)  # the switch is of the fork alone
    assert count(reference.fork()) == count(reference)
    grown = reference.fork(trainable=True)
    assert count(grown) == count(policy)
    assert len(grown.trainable_parameters()) == 2 * layers


def test_whoever_writes_a_delta_into_such_a_fork_gets_it(load):
    policy = filled(load("sd3"))
    layers = sum("lora_A" in key for key in policy.trainable_parameters())
    with torch.no_grad():
        expected = velocity(policy)
    moved = policy.fork(pristine=True)
    view = moved.sized((64, 32))
    bare = count(moved)
    for parameter in moved.own_parameters().values():  # a checkpoint that holds zeros
        with torch.no_grad():
            parameter.copy_(parameter.clone())
    assert count(moved) == bare
    moved.lerp_(policy, 1.0)
    assert count(moved) == bare + 2 * layers
    with torch.no_grad():
        torch.testing.assert_close(velocity(moved), expected)
    assert not moved.trainable_parameters()
    with torch.no_grad():
        torch.testing.assert_close(velocity(view.fork().sized(moved.family.size)), expected)


def test_a_run_trains_masters_in_float32(load):
    policy = load("sd3", dtype="bfloat16", lora=LoRA(rank=2))
    before = {name: parameter.detach().clone() for name, parameter in policy.trainable_parameters().items()}
    loop = AlignmentLoop(SoftmaxTB(policy, rows=2), TREE, channel_reward, Prompts(list(PROMPTS)), prompts_per_step=2)
    loop.run(2)
    after = policy.trainable_parameters()
    assert all(parameter.dtype == torch.float32 for parameter in after.values())
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert sum("lora_B" in name for name in changed) > len(before) // 4


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_reference_of_a_run_that_starts_at_the_base_pays_nothing(load, dtype, guided):
    policy = load("sd3", dtype=dtype, lora=LoRA(rank=2))
    layers = sum("lora_A" in key for key in policy.trainable_parameters())
    acting = Guided(policy, 2.0) if guided else policy
    made = [
        SoftmaxTB(acting).reference,
        FlowGRPO(acting, kl=0.1).reference,
        GroupForwardKL(acting).reference,
        DGPO(acting).reference,
        DiffusionNFT(acting, kl=0.1).reference,
    ]
    assert [count(innermost(policy)) - count(innermost(each)) for each in made] == [2 * layers] * 5
    plain = innermost(acting.fork())
    with torch.no_grad():
        assert torch.equal(velocity(innermost(made[0])), velocity(plain))
    assert made[0].own_parameters().keys() == acting.fork().own_parameters().keys()
    assert all(torch.equal(one, two) for one, two in zip(made[0].own_parameters().values(), acting.own_parameters().values(), strict=True))


def test_the_reference_of_a_policy_with_a_delta_computes_it(load):
    policy = filled(load("sd3", dtype="bfloat16"))
    assert not policy.without_delta
    assert count(SoftmaxTB(policy).reference) == count(policy)
    with torch.no_grad():
        assert torch.equal(velocity(SoftmaxTB(policy).reference), velocity(policy))
    assert policy.fork(pristine=True).without_delta
    assert not FlowMatchingPolicy.from_pretrained("shapeworld", device="cpu").without_delta
