"""Constants of a UNet: copied to the device once, for all calls, forks and sizes."""

import copy

import pytest
import torch
from tiny_pipelines import saved

from diffalign.core import Prompt
from diffalign.policies import FlowMatchingPolicy, LoRA

UNETS = ("sd15", "sdxl")


@pytest.fixture
def load(tmp_path_factory):
    def load(name, device, **options):
        torch.manual_seed(0)
        given = {"lora": LoRA(rank=2), "resolution": 32, **options}
        return FlowMatchingPolicy.from_pretrained(saved(tmp_path_factory, name), device=device, **given)

    return load


def called(policy):
    """A call whose inputs are on the device already."""
    condition = policy.encode([Prompt("a red cube")])
    latents = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(0)).to(policy.device)
    sigma = policy.sigmas(4)[[1]].to(policy.device)

    def call():
        with torch.no_grad():
            return policy.velocity(latents, sigma, condition)

    return call


@pytest.mark.parametrize("name", UNETS)
def test_a_call_copies_nothing_and_waits_for_nothing(name, load, traffic):
    policy = load(name, "far")
    calls = [called(some) for some in (policy, policy.fork(), policy.fork(pristine=True))]
    first = calls[0]()
    before = (traffic.bytes_up, traffic.bytes_down, traffic.synchronizations)
    further = [call() for call in calls]
    assert (traffic.bytes_up, traffic.bytes_down, traffic.synchronizations) == before
    assert all(torch.equal(velocity.cpu(), first.cpu()) for velocity in further)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", UNETS)
def test_sizes_types_and_devices_have_constants_of_their_own(name, dtype, load):
    """On the policy and a wider view in turn, and on the CPU after a deep copy that was moved there."""
    policy = load(name, "far", dtype=dtype)
    wide = policy.sized((32, 64))
    found = [called(some)() for some in (policy, wide, policy, wide)]
    alone = load(name, "far", dtype=dtype, resolution=[32, 64])
    assert torch.equal(found[1].cpu(), called(alone)().cpu())
    assert torch.equal(found[0].cpu(), found[2].cpu())
    assert torch.equal(found[1].cpu(), found[3].cpu())
    family = copy.deepcopy(policy).family
    for device in ("cpu", "far"):
        levels = policy.family.sigmas(8)[:-1].to(device)
        assert torch.equal(family.timestep(levels).cpu(), policy.family.timestep(levels.cpu()))
