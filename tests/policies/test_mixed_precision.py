"""`compute`: float32 weights, products in bfloat16."""

import pytest
import torch

from diffalign import AlignmentLoop, Prompt
from diffalign.objectives import SoftmaxTB
from diffalign.prompts import Prompts
from diffalign.samplers import FixedPlan, TreeSampler
from diffalign.testing import channel_reward

PROMPTS = [Prompt("a red cube"), Prompt("two green cats")]
FAMILIES = ("sd3", "flux-dev", "flux2-klein", "z-image", "qwen-image", "sana", "sd15", "sdxl")


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
    with pytest.raises(ValueError, match=r"compute must be left out where dtype is bfloat16"):
        load("sd3", dtype="bfloat16", compute="bfloat16")
