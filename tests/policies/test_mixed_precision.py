"""`compute`: float32 weights, products in bfloat16."""

import pytest
import torch

from diffalign import AlignmentLoop, Prompt
from diffalign.objectives import SoftmaxTB
from diffalign.policies import products
from diffalign.prompts import Prompts
from diffalign.samplers import FixedPlan, TreeSampler
from diffalign.testing import channel_reward

PROMPTS = [Prompt("a red cube"), Prompt("two green cats")]
FAMILIES = ("sd3", "flux-dev", "flux2-klein", "z-image", "qwen-image", "sana", "sd15", "sdxl")


@pytest.fixture(autouse=True)
def units(monkeypatch):
    """A CPU that multiplies in bfloat16, whatever the one at hand can do."""
    monkeypatch.setattr(products, "cpu_has_bfloat16", lambda: True)


@pytest.fixture
def no_units(monkeypatch):
    monkeypatch.setattr(products, "cpu_has_bfloat16", lambda: False)
    products.say_float32.cache_clear()


def velocity(policy):
    latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    return policy.velocity(latents, policy.sigmas(4)[[1, 2]], policy.encode(PROMPTS))


@pytest.mark.parametrize("name", FAMILIES)
def test_it_rounds_and_nothing_else(load, name):
    whole, mixed = load(name), load(name, compute="bfloat16")
    with torch.no_grad():
        exact, rounded = velocity(whole), velocity(mixed)
    assert rounded.dtype == exact.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    assert float((rounded - exact).norm() / exact.norm()) < 0.05
    assert (whole.precision, mixed.precision) == (torch.float32, torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(velocity(mixed.fork(pristine=True)), rounded)  # forks compute alike; fresh adapters add nothing


def test_weights_and_gradients_of_full_fine_tuning_stay_in_float32(load):
    policy = load("sd3", lora=None, compute="bfloat16")
    velocity(policy).square().mean().backward()
    found = {(parameter.dtype, parameter.grad.dtype) for parameter in policy.trainable_parameters().values() if parameter.grad is not None}
    assert found == {(torch.float32, torch.float32)}


def test_a_run_passes_the_contract_of_its_precision(load):
    policy = load("sd3", compute="bfloat16")
    before = {name: parameter.detach().clone() for name, parameter in policy.trainable_parameters().items()}
    AlignmentLoop(
        objective=SoftmaxTB(policy),
        sampler=TreeSampler(steps=4, plan=FixedPlan([1, 2], branches=2)),
        rewards=channel_reward,
        prompts=Prompts([str(prompt) for prompt in PROMPTS]),
        prompts_per_step=2,
        optimizers={"policy": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)},
    ).run(2)
    assert any(not torch.equal(parameter, before[name]) for name, parameter in policy.trainable_parameters().items())


def test_half_precision_weights_have_no_other_type_to_compute_in(load):
    with pytest.raises(ValueError, match=r"compute must be left out if dtype is bfloat16"):
        load("sd3", dtype="bfloat16", compute="bfloat16")


def test_a_cpu_without_units_for_it_computes_in_float32_and_says_so_once(load, no_units, capsys):
    whole, mixed = load("sd3"), load("sd3", compute="bfloat16")
    fork = mixed.fork(trainable=True)
    with torch.no_grad():
        exact = velocity(whole)
        for policy in (mixed, fork, mixed.fork(pristine=True)):
            assert torch.equal(velocity(policy), exact)
            assert policy.precision == torch.float32
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "this CPU has no units for products in bfloat16" in said
    assert "computes in float32" in said


def test_it_is_the_device_that_decides(no_units, capsys):
    assert products.multiplied_in(None, torch.device("cpu")) is None
    assert products.multiplied_in(torch.bfloat16, torch.device("cuda")) is torch.bfloat16
    assert products.multiplied_in(torch.float16, torch.device("cpu")) is torch.float16
    assert not capsys.readouterr().err
    assert products.multiplied_in(torch.bfloat16, torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({"_is_amx_tile_supported": False, "_is_avx512_bf16_supported": True}, True),
        ({"_is_amx_tile_supported": True, "_is_avx512_bf16_supported": False}, True),
        ({"_is_amx_tile_supported": False, "_is_avx512_bf16_supported": False}, False),
        ({"_is_avx512_bf16_supported": True}, True),
        ({}, False),  # a torch that does not tell: float32 is never wrong
    ],
    ids=str,
)
def test_torch_is_asked_what_the_cpu_has(answers, expected, monkeypatch):
    monkeypatch.undo()  # of the fixture above
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cpu, name, lambda answer=answer: answer, raising=False)
    products.cpu_has_bfloat16.cache_clear()
    assert products.cpu_has_bfloat16() is expected
    products.cpu_has_bfloat16.cache_clear()
