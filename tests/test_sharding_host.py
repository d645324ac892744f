"""A denoiser that waits in the host's memory until it is spread: never whole on a device, one copy for its forks."""

from pathlib import Path

import pytest
import torch
from started import start_two
from tiny_pipelines import BUILD, built
from torch import nn

from diffalign import config
from diffalign.core import Condition, ConfigError, HostWeights
from diffalign.policies import FlowMatchingPolicy, LoRA
from diffalign.processes.sharding import FullySharded

HERE = Path(__file__).parent
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """A pipeline whose denoiser lies in 16 bits, as published ones do."""
    folder = tmp_path_factory.mktemp("halves")
    pipeline = built(BUILD["sd3"])
    pipeline.transformer.to(torch.bfloat16)
    pipeline.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, halves):
    path = tmp_path_factory.mktemp("host")
    done = start_two(HERE / "host_processes.py", path, halves)
    assert done.returncode == 0, done.stderr[-3000:]
    return path


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_network_that_waits_gives_the_same_run_and_is_never_moved_whole(folder, kind):
    for rank in range(2):
        loaded, waited = (torch.load(folder / f"{kind}-{waits}-{rank}.pt", weights_only=True) for waits in (False, True))
        assert all(torch.equal(waited["weights"][name], value) for name, value in loaded["weights"].items())
        assert waited["weights"].keys() == loaded["weights"].keys()
        assert loaded["spread"] == waited["spread"] > 0.8
        assert loaded["moved"] > 0.95
        assert waited["moved"] < 0.5
        assert (loaded["before"], waited["before"]) == (torch.float32, torch.bfloat16)  # mapped from the files as it is in them
        assert loaded["shared"] is False
        assert waited["shared"] is (kind == "full")


def test_recomputed_activations_gather_no_weight_twice(folder):
    counts = torch.load(folder / "gathered-0.pt", weights_only=True)
    forward, backward = counts["full-False"]
    assert forward == backward > 0
    assert counts["full-True"] == [forward, backward]
    assert counts["lora-False"][0] == counts["lora-True"][0] == forward
    assert counts["lora-False"][1] < counts["lora-True"][1] < forward  # also what no gradient passes through


def test_products_in_the_type_of_the_base_are_those_of_a_base_that_is_not_spread(folder):
    """Adapters stay whole, with masters in float32; the base in bfloat16 that they stand above is spread."""
    for rank in range(2):
        whole, spread = (torch.load(folder / f"half-{name}-{rank}.pt", weights_only=True) for name in ("whole", "spread"))
        for found in (whole, spread):
            assert found["in the type of the base"]
            assert (found["trained"], found["base"]) == ({torch.float32}, {torch.bfloat16})
        assert (whole["spread"], spread["spread"]) == (0.0, 1.0)
        assert spread["after"].keys() == whole["after"].keys()
        assert all(torch.equal(spread["after"][name], value) for name, value in whole["after"].items())
        moved = [name for name, value in spread["before"].items() if not torch.equal(spread["after"][name], value)]
        assert len(moved) > len(spread["after"]) // 2


def test_no_thread_of_the_group_outlives_it(folder):
    for rank in range(2):
        assert "gloo" not in (folder / f"threads-{rank}").read_text()


def test_all_but_the_denoiser_goes_to_the_device_at_once(halves):
    policy = FlowMatchingPolicy.from_pretrained(halves, lora=LoRA(rank=2), device="meta", sharding=FullySharded())
    assert {parameter.device.type for parameter in policy.network.parameters()} == {"cpu"}
    parts = [part for part in policy.family.pipeline.components.values() if isinstance(part, nn.Module)]
    assert len(parts) == 4
    assert {parameter.device.type for part in parts for parameter in part.parameters()} == {"meta"}
    assert policy.device == policy.fork().device == policy.prior(torch.zeros(1, *policy.latent_shape)).device == torch.device("meta")
    assert policy.family.dtype == torch.float32


def test_a_network_that_waits_cannot_be_evaluated(halves):
    policy = FlowMatchingPolicy.from_pretrained(halves, device="cpu", sharding=FullySharded())
    with pytest.raises(RuntimeError, match=r"wait in the host's memory to be sharded over processes\. Give the AlignmentLoop"):
        policy.velocity(torch.zeros(1, *policy.latent_shape), torch.ones(1), Condition((), torch.zeros(0), {}))


def test_a_run_tells_its_policy_that_it_will_be_spread(halves):
    text = f"""
policy: {{class_path: FlowMatchingPolicy.from_pretrained, init_args: {{path: {halves}, device: cpu}}}}
objective: SoftmaxTB
sampler: {{class_path: TreeSampler, init_args: {{steps: 5}}}}
rewards: diffalign.testing.doubles.channel_reward
prompts: {{class_path: Prompts, init_args: {{prompts: [a]}}}}
"""
    run, sharding = config.parse_text(text), FullySharded()
    with pytest.raises(ConfigError, match=r"sharding needs several processes"):
        run.build(sharding=sharding)
    assert sharding.host._held
    assert "sharding" not in run.yaml()
    assert run.build().objective.policy.host is None
    with pytest.raises(ConfigError, match=r"policy\.sharding must be left out: it is the run's own sharding"):
        config.parse_text(text.replace("device: cpu", "device: cpu, sharding: FullySharded"))


def test_a_fork_has_memory_of_its_own_once_placed():
    host, network = HostWeights(), nn.Linear(3, 2).bfloat16()
    host.hold(network, torch.float32)
    lent = host.lend(network.parameters())
    twin = nn.Linear(3, 2)
    twin.weight, twin.bias = (lent[id(parameter)] for parameter in network.parameters())
    assert twin.weight.data_ptr() == network.weight.data_ptr()
    assert host.holds(network)
    assert host.holds(twin)
    for module in (network, twin):
        host.place(module, CPU, copy=True)
    host.require_none()
    assert not host.holds(network)
    assert twin.weight.dtype == network.weight.dtype == torch.float32
    with torch.no_grad():
        twin.weight.zero_()
    assert network.weight.count_nonzero() > 0


def test_memory_that_is_lent_must_not_be_written():
    host, network = HostWeights(), nn.Linear(3, 2)
    host.hold(network)
    with torch.no_grad():
        network.weight.zero_()  # before the first fork: as in any policy
    twin = nn.Module()
    twin.weight = host.lend([network.weight])[id(network.weight)]
    with torch.no_grad():
        twin.weight.fill_(1.0)
    with pytest.raises(RuntimeError, match="weight of a Linear was written while a fork had the same memory"):
        host.place(network, CPU, copy=True)


def test_weights_that_nobody_places_are_an_error():
    host = HostWeights()
    host.hold(nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"2 tensors \(first: \(2, 3\)\) wait to be sharded but belong to no policy of the run"):
        host.require_none()
