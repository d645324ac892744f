"""Packing of latents into tokens."""

import torch

from diffalign.policies.diffusers.packing import pack, unpack


def test_packing_agrees_with_the_release_and_is_undone(golden):
    row = golden["flux_packing"]
    latents = torch.tensor(row["latent"])
    assert torch.equal(pack(latents), torch.tensor(row["packed"]))
    assert torch.equal(unpack(pack(latents), *latents.shape[-2:]), latents)
