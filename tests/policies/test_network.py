"""A network of the user's own as a policy."""

import pytest
import torch
from torch import nn

from diffalign import AlignmentLoop, Prompt
from diffalign.core import CPS, FlowSDE
from diffalign.core.policy import require_frozen
from diffalign.objectives import FlowGRPO, SoftmaxTB
from diffalign.policies import NetworkPolicy
from diffalign.prompts import Prompts
from diffalign.samplers import ChainSampler, FixedPlan, TreeSampler


class Field(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(13, 8), nn.Linear(8, 12)

    def forward(self, latents, sigma):
        return self.outer(self.inner(torch.cat([latents.flatten(1), sigma[:, None]], dim=1)).tanh()).view_as(latents)


def policy(frozen=False, **options):
    torch.manual_seed(0)
    network = Field()
    network.inner.requires_grad_(not frozen)
    return NetworkPolicy(network, (3, 2, 2), **options)


def test_velocity_is_the_networks_and_is_counted():
    mine = policy()
    latents, sigma = torch.randn(5, 3, 2, 2), torch.rand(5)
    condition = mine.encode([Prompt("x")] * 5)
    assert torch.equal(mine.velocity(latents, sigma, condition), mine.network(latents, sigma))
    assert (mine.counter.rows, mine.counter.calls) == (5, 1)


def test_latents_are_images_unless_a_decoder_says_otherwise():
    latents = torch.tensor([-1.0, 0.0, 3.0]).view(1, 3, 1, 1)
    assert policy().decode(latents).flatten().tolist() == [0.0, 0.5, 1.0]
    assert policy(decode=lambda latents: latents + 7).decode(latents).flatten().tolist() == [6.0, 7.0, 10.0]


@pytest.mark.parametrize("frozen", [False, True])
def test_a_fork_owns_what_is_trained_and_shares_the_rest(frozen):
    mine = policy(frozen, kernel=FlowSDE("sum"), shift=3.0)
    twin = mine.fork(trainable=True)
    assert (twin.network.inner.weight is mine.network.inner.weight) == frozen
    assert twin.network.outer.weight is not mine.network.outer.weight
    assert torch.equal(twin.network.outer.weight, mine.network.outer.weight)
    assert (twin.kernel, twin.shift, twin.latent_shape) == (mine.kernel, mine.shift, mine.latent_shape)
    assert set(twin.own_parameters()) == {f"network.{name}" for name in twin.network.state_dict() if not frozen or "outer" in name}
    assert not mine.fork().trainable_parameters()
    assert set(mine.fork().fork(trainable=True).trainable_parameters()) == set(mine.trainable_parameters())  # through a frozen fork
    if frozen:
        with pytest.raises(RuntimeError, match="would change every fork"):
            twin.to(torch.float64)


def test_there_is_no_pristine_fork():
    with pytest.raises(ValueError, match="Fork it before training"):
        policy().fork(pristine=True)


def test_it_trains():
    mine = policy(kernel=CPS("sum"))
    before = mine.network.outer.weight.clone()
    loop = AlignmentLoop(
        SoftmaxTB(mine),
        TreeSampler(4, FixedPlan((0, 1))),
        lambda images, prompts: images.mean(dim=(1, 2, 3)),
        Prompts(["x"]),
        prompts_per_step=1,
    )
    loop.run(2)
    assert not torch.equal(mine.network.outer.weight, before)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.colours = nn.Linear(12, 3)

    def forward(self, latents):
        return self.colours(latents.flatten(1)).sigmoid()[:, :, None, None]


def test_a_decoder_with_weights_is_no_part_of_what_is_trained():
    decoder = Decoder()
    mine = policy(decode=decoder)
    names = {f"network.{name}" for name in mine.network.state_dict()}
    assert set(mine.trainable_parameters()) == set(mine.own_parameters()) == set(mine.state_dict()) == names
    twin = mine.fork()
    require_frozen(twin, "reference")
    latents = torch.randn(2, 3, 2, 2)
    assert torch.equal(mine.decode(latents), decoder(latents))
    assert torch.equal(twin.decode(latents), decoder(latents))
    assert all(parameter.requires_grad for parameter in decoder.parameters())  # it is the user's, as it was
    assert policy(decode=Decoder().half()).precision == torch.float32


def test_a_decoder_with_weights_moves_with_its_policy_and_not_with_a_fork():
    mine = policy(decode=Decoder())
    assert mine.to(torch.float64).decode(torch.randn(2, 3, 2, 2, dtype=torch.float64)).dtype == torch.float64
    assert mine.to("meta").decode(torch.randn(2, 3, 2, 2, device="meta", dtype=torch.float64)).is_meta
    mine = policy(decode=Decoder())
    twin = mine.fork(trainable=True)
    for either in (mine, twin):
        with pytest.raises(RuntimeError, match="would change every fork"):
            either.to(torch.float64)
    policy(decode=lambda latents: latents).fork().to(torch.float64)  # nothing is shared


class Normed(nn.Module):
    """A decoder whose pictures depend on their batch while it is in training mode, and whose statistics then move."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, latents):
        return self.norm(latents).sigmoid()


def test_a_decoder_decodes_in_evaluation_mode_whatever_mode_it_and_its_policy_are_in():
    decoder = Normed()
    mine = policy(kernel=CPS("sum"), decode=decoder)
    latents, before = torch.randn(4, 3, 2, 2), decoder.norm.running_mean.clone()
    for each in (mine, mine.fork()):
        for again in (each.train, decoder.train):
            again()
            pictures = each.decode(latents)
            torch.testing.assert_close(pictures[:2], each.decode(latents[:2]))
            assert not decoder.norm.training
    assert mine.network.training  # the mode of the network is left as it was
    AlignmentLoop(
        SoftmaxTB(mine), ChainSampler(3, samples=4), lambda images, prompts: images.mean(dim=(1, 2, 3)), ["x"], prompts_per_step=1
    ).advance(1)
    assert torch.equal(decoder.norm.running_mean, before)


def test_an_exported_program_decodes():
    decoder = Normed().eval()
    latents = torch.randn(4, 3, 2, 2)
    exported = torch.export.export(decoder, (latents,)).module()
    torch.testing.assert_close(policy(decode=exported).decode(latents), decoder(latents))


@pytest.mark.parametrize("make", [SoftmaxTB, FlowGRPO])
def test_a_policy_with_a_decoder_of_weights_trains_and_leaves_them(make):
    decoder = Decoder()
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    mine = policy(kernel=CPS("sum"), decode=decoder)
    weight = mine.network.outer.weight.clone()
    loop = AlignmentLoop(
        make(mine), ChainSampler(3, samples=4), lambda images, prompts: images.mean(dim=(1, 2, 3)), ["x"], prompts_per_step=1
    )
    loop.advance(2)
    assert not torch.equal(mine.network.outer.weight, weight)
    assert all(torch.equal(tensor, before[name]) for name, tensor in decoder.state_dict().items())
    assert sum(len(group["params"]) for group in loop.running["policy"].param_groups) == 4
