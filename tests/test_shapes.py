"""Published shapes: their numbers are those of the networks that diffusers makes of them."""

import diffusers
import pytest
import torch

from benchmarks.subjects.published_shapes import MODELS, Published
from diffalign.costs.shapes import PUBLISHED


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_network_of_this_shape_has_as_many_weights(name):
    shape = PUBLISHED[name]
    with torch.device("meta"):
        network = getattr(diffusers, shape.network)(**shape.config)
    assert sum(parameter.numel() for parameter in network.parameters()) == shape.weights
    assert hasattr(diffusers, shape.pipeline)


@pytest.mark.parametrize("name", ["FLUX.2-klein-4B", "Sana-1.6B", "SD1.5 512"])
def test_a_policy_of_this_shape_has_the_latents_of_its_family(name):
    model = MODELS[name]
    assert model.policy(torch.bfloat16, lora=False).latent_shape == model.shape.latent((model.pixels, model.pixels))


def test_latents_of_other_sizes():
    shape = PUBLISHED["FLUX.1-dev"]
    assert shape.latent() == (16, 128, 128)
    assert shape.latent((512, 768)) == (16, 64, 96)
    with pytest.raises(ValueError, match="size must have sides divisible by 8 for FluxPipeline; got 500 x 512"):
        shape.latent((500, 512))
    assert Published(shape).pixels == shape.pixels
