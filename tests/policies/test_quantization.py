"""A quantised frozen base: 4 or 8 bits below float32 adapters, on the tiny pipelines."""

import math
import sys

import pytest
import torch

from diffalign import AlignmentLoop, Prompt
from diffalign.config.parts import find
from diffalign.core import Edges, Progress, SingleProcess, Streams, check_first_step, replay
from diffalign.export import export
from diffalign.objectives import SoftmaxTB
from diffalign.policies import LoRA
from diffalign.policies.diffusers.quantization import quantize
from diffalign.processes.sharding import FullySharded
from diffalign.prompts import Prompts
from diffalign.samplers import Branching, TreeSampler
from diffalign.testing import GivenPlan, channel_reward

bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs pip install 'diffalign[quantized]'")

PROMPTS = [Prompt("a red cube"), Prompt("two green cats")]
TREE = TreeSampler(4, GivenPlan(Branching((1, 2, 2, 1), (0.0, 0.7, 0.7, 0.0))))
FAMILIES = ("sd3", "flux-dev", "flux2-klein", "z-image", "qwen-image", "sana", "sd15", "sdxl")
KINDS = ("nf4", "int8")


def velocity(policy):
    latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    return policy.velocity(latents, torch.tensor([0.9, 0.3]), policy.encode(PROMPTS))


def quantized_layers(policy):
    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    # peft has classes of its own that wrap these
    return {name: module for name, module in policy.network.named_modules() if type(module) in kinds}


def rounded(layer):
    """What the weights of a quantised layer stand for."""
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    codes = layer.weight.data.float()
    scale = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    return codes * scale[:, None] / 127


@pytest.mark.parametrize(("name", "kind"), [*((name, "nf4") for name in FAMILIES), ("flux-dev", "int8"), ("sd15", "int8")])
def test_every_family_runs_and_trains_above_a_quantised_base(load, name, kind):
    policy = load(name, quantization=kind)
    layers = quantized_layers(policy)
    assert layers
    assert all(not layer.weight.is_floating_point() for layer in layers.values())
    assert all(parameter.dtype == torch.float32 for parameter in policy.trainable_parameters().values())
    assert policy.precision == policy.family.dtype == torch.float32
    result = velocity(policy)
    result.square().sum().backward()
    gradients = [parameter.grad for parameter in policy.trainable_parameters().values() if parameter.grad is not None]
    assert sum(bool(gradient.any()) for gradient in gradients) >= len(policy.trainable_parameters()) // 4
    assert all(gradient.isfinite().all() for gradient in gradients)
    with torch.no_grad():
        plain = velocity(load(name))
        error = float((result - plain).norm() / plain.norm())
    assert 1e-5 < error < (0.3 if kind == "nf4" else 0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_base_computes_as_the_weights_that_it_stands_for(load, kind):
    policy, plain = load(quantization=kind), load()
    with torch.no_grad():
        modules = dict(plain.network.named_modules())
        for name, layer in quantized_layers(policy).items():
            modules[name].weight.copy_(rounded(layer))
        # int8 rounds inputs too, to 1/254 of the largest of a row
        torch.testing.assert_close(velocity(policy), velocity(plain), rtol=0, atol=1e-5 if kind == "nf4" else 0.02)


def test_embeddings_and_projections_keep_their_precision(load):
    policy = load(quantization="nf4")
    outside = {name for name, module in policy.network.named_modules() if type(module) is torch.nn.Linear and "lora_" not in name}
    assert {"x_embedder", "context_embedder", "proj_out", "norm_out.linear"} <= outside
    assert all("blocks." in name for name in quantized_layers(policy))
    assert not any("blocks." in name for name in outside)


@pytest.mark.parametrize("kind", KINDS)
def test_forks_share_the_quantised_tensors(load, kind):
    policy = load(quantization=kind)
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter += 0.1
        velocity(policy)
    forks = (policy.fork(), policy.fork(trainable=True), policy.fork().fork(pristine=True))
    mine = dict(policy.network.named_parameters())
    for fork in forks:
        theirs = dict(fork.network.named_parameters())
        assert {name for name in mine if mine[name] is not theirs[name]} == set(policy.own)
        assert quantized_layers(fork).items() == quantized_layers(policy).items()
    with torch.no_grad():
        expected = velocity(policy)
        assert torch.equal(velocity(forks[0]), expected)
        assert torch.equal(velocity(forks[1]), expected)
        torch.testing.assert_close(velocity(forks[2]), velocity(load(quantization=kind, lora=LoRA(rank=2, init="zero"))))
        assert not torch.allclose(velocity(forks[2]), expected, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_first_step_contract_holds_and_checkpointing_changes_no_gradient(load, kind, checkpointing):
    policy = load(quantization=kind, checkpointing=checkpointing)
    with torch.no_grad():
        forest = TREE.sample(policy, policy.encode(PROMPTS), Progress(0, 1), Streams(3))
    assert check_first_step(policy, forest).deviation == 0.0

    def gradients(of):
        replay(of, forest, Edges.of(forest)).mean.square().sum().backward()
        return [parameter.grad for parameter in of.trainable_parameters().values()]

    for one, other in zip(gradients(policy), gradients(load(quantization=kind)), strict=True):
        torch.testing.assert_close(one, other)


def test_a_run_in_bfloat16_trains_adapters_alone(load):
    policy = load(quantization="nf4", dtype="bfloat16", checkpointing=True)
    assert policy.precision == torch.bfloat16
    before = {name: parameter.detach().clone() for name, parameter in policy.network.named_parameters()}
    loop = AlignmentLoop(SoftmaxTB(policy, rows=2), TREE, channel_reward, Prompts(list(PROMPTS)), prompts_per_step=2)
    loop.run(2)
    after = dict(policy.network.named_parameters())
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(policy.own)
    assert math.isfinite(loop.reward)


@pytest.mark.parametrize(("kind", "bits"), [("nf4", 5.0), ("int8", 9.0)])
def test_weights_take_as_many_bits_as_promised(kind, bits):
    network = torch.nn.Sequential(torch.nn.ModuleList([torch.nn.Linear(256, 256, bias=False)]))
    quantize(network, kind)
    layer = network.to("cpu")[0][0]
    tensors = [layer.weight.data]
    if kind == "nf4":
        state = layer.weight.quant_state
        tensors += [state.absmax, state.state2.absmax]
    assert 8 * sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 256**2 < bits


def test_what_a_quantised_base_cannot_do_is_refused(load, tmp_path):
    with pytest.raises(ValueError, match="quantization must be left out when all weights are trained, because nf4 has no gradient"):
        load(quantization="nf4", lora=None)
    policy = load(quantization="nf4")
    with pytest.raises(ValueError, match=r"the base is quantised, and merging.*--policy.quantization null"):
        export(policy, tmp_path, "merged")
    with pytest.raises(ValueError, match=r"sharding needs weights in a floating type.*Leave out policy.quantization or sharding"):
        FullySharded().shard({"policy": policy}, SingleProcess())
    with pytest.raises(ValueError, match="quantization needs linear layers in the blocks of the network; Linear has none"):
        quantize(torch.nn.Linear(2, 2), "nf4")


def test_adapters_of_a_quantised_base_are_exported(load, tmp_path):
    policy = load(quantization="nf4")
    export(policy, tmp_path, "diffusers")
    started = load(lora=LoRA(rank=2, start=str(tmp_path)))
    mine, theirs = policy.trainable_parameters(), started.trainable_parameters()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    for name in ("bitsandbytes", "bitsandbytes.nn"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"quantization 'nf4' needs the package bitsandbytes: pip install 'diffalign\[quantized\]'"):
        quantize(torch.nn.Linear(2, 2), "nf4")


def test_the_librarys_optimizers_do_not_take_the_names_of_torchs():
    assert issubclass(bitsandbytes.optim.AdamW, torch.optim.Optimizer)
    assert find("AdamW", [torch.optim.Optimizer]) is torch.optim.AdamW
    assert find("PagedAdamW", [torch.optim.Optimizer]) is bitsandbytes.optim.PagedAdamW
