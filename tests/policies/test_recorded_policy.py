"""A policy whose calls are recorded: forks, adapters, sizes, types and training, each as without recordings."""

import copy

import attrs
import torch
from tape import Tape

from diffalign.policies import CallGraphs, LoRA


def test_without_cuda_nothing_is_recorded(load):
    policy = load("sd3", graphs=CallGraphs())
    condition = policy.encode(["a red cube", "two green cats"])
    latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    sigma = policy.sigmas(4)[[1, 2]]
    with torch.no_grad():
        found = [policy.velocity(latents, sigma, condition) for _ in range(3)]
        assert torch.equal(found[0], load("sd3").velocity(latents, sigma, condition))
    assert not policy._recorded._seen


def on_the_cpu(policy):
    """The policy with a recorder that works here."""
    policy._recorded = attrs.evolve(policy._recorded, recorder=Tape())
    return policy._recorded.recorder


def test_every_fork_records_its_own_calls_and_sees_its_adapters(load):
    policy, plain = (load("sd3", lora=LoRA(rank=2), **more) for more in ({"graphs": CallGraphs()}, {}))
    condition = policy.encode(["a red cube", "two green cats"])
    latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    sigma = policy.sigmas(4)[[1, 2]]
    pairs = [(policy, plain), (policy.fork(), plain.fork()), (policy.fork(pristine=True), plain.fork(pristine=True))]
    for mine, theirs in pairs:
        recorder = on_the_cpu(mine)
        with torch.no_grad():
            for turn in range(4):
                assert torch.equal(mine.velocity(latents, sigma, condition), theirs.velocity(latents, sigma, condition))
                if turn == 2:  # B of every adapter: those that were left out are on from here
                    for each in (mine, theirs):
                        drawn = torch.Generator().manual_seed(1)
                        for name, parameter in each.own_parameters().items():
                            if "lora_B" in name:
                                parameter.normal_(generator=drawn)
        assert recorder.replayed >= 1
    sizes = {len(mine._recorded._known) for mine, _ in pairs[:2]}
    assert sizes == {1}


def test_images_of_another_size_are_recorded_once(load):
    policy = load("sd3", graphs=CallGraphs())
    recorder = on_the_cpu(policy)
    condition = policy.encode(["a red cube", "two green cats"])
    for seed in range(4):
        view = policy.sized((64, 32))  # a rollout makes one
        assert view is not policy
        for each in (view, policy):
            latents = torch.randn(2, *each.latent_shape, generator=torch.Generator().manual_seed(seed))
            with torch.no_grad():
                each.velocity(latents, each.sigmas(4)[[1, 2]], condition)
    assert recorder.recorded == 2
    assert recorder.replayed == 2 * 2


def test_a_recorded_call_in_bfloat16_sees_weights_that_are_written(load, monkeypatch):
    """autocast keeps the casts of weights within its context; a recording must cast them anew."""
    monkeypatch.setattr("diffalign.policies.products.cpu_has_bfloat16", lambda: True)
    policy, plain_policy = (load("sd3", compute="bfloat16", lora=LoRA(rank=2), **more) for more in ({"graphs": CallGraphs()}, {}))
    recorder = on_the_cpu(policy)
    condition = policy.encode(["a red cube", "two green cats"])
    latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    for _ in range(4):
        with torch.no_grad():
            found, expected = (each.velocity(latents, each.sigmas(4)[[1, 2]], condition) for each in (policy, plain_policy))
            assert torch.equal(found, expected)
            for each in (policy, plain_policy):
                for name, parameter in each.own_parameters().items():
                    parameter.add_(0.05 if "lora_B" in name else 0.0)
    assert recorder.replayed == 2


def test_a_training_step_is_the_same(load):
    """Two pieces of an update, with a reference, through recorded calls."""
    found = []
    for settings in ({"graphs": CallGraphs(gradients=True)}, {}):
        policy = load("sd3", lora=LoRA(rank=2), **settings)
        if settings:
            recorder = on_the_cpu(policy)
        condition = policy.encode(["a red cube", "two green cats"])
        before = [parameter.detach().clone() for parameter in policy.trainable_parameters().values()]
        optimizer = torch.optim.SGD(policy.trainable_parameters().values(), lr=1e-4)
        for step in range(4):
            for piece in range(2):
                latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(2 * step + piece))
                policy.velocity(latents, policy.sigmas(4)[[1, 2]], condition).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        found.append([parameter.detach() for parameter in policy.trainable_parameters().values()])
    assert recorder.recorded == 2
    assert recorder.replayed == 2 * 6
    assert not any(torch.equal(mine, first) for mine, first in zip(found[0][1::2], before[1::2], strict=True))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*found, strict=True))


def test_a_copy_records_the_calls_of_its_own_weights(load):
    policy = load("sd3", lora=LoRA(rank=2), graphs=CallGraphs())
    on_the_cpu(policy)
    condition = policy.encode(["a red cube", "two green cats"])
    latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    sigma = policy.sigmas(4)[[1, 2]]
    with torch.no_grad():
        before = [policy.velocity(latents, sigma, condition) for _ in range(3)][-1]
        copied = copy.deepcopy(policy)
        assert copied._recorded.network is copied.network
        assert policy._recorded.count(gradient=False) == 1
        assert copied._recorded.count(gradient=False) == 0
        for name, parameter in copied.own_parameters().items():
            if "lora_B" in name:
                parameter.add_(0.5)
        after = [copied.velocity(latents, sigma, condition) for _ in range(3)][-1]
        assert copied._recorded.count(gradient=False) == 1
        assert not torch.equal(before, after)
        assert torch.equal(before, policy.velocity(latents, sigma, condition))
