"""Choices of `from_pretrained`: size, guidance input, autoencoder in pieces, attention backend."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler
from tiny_pipelines import BUILD, built, saved

from diffalign import Prompt
from diffalign.core import Guided, ShiftedGrid
from diffalign.policies import FlowMatchingPolicy, LoRA
from diffalign.policies.diffusers.stable_diffusion import StableDiffusion

PROMPTS = [Prompt("a red cube"), Prompt("two green cats")]


@pytest.fixture
def load(tmp_path_factory):
    def load(name, **options):
        options = {"lora": LoRA(rank=2), "resolution": 32, "device": "cpu", **options}
        return FlowMatchingPolicy.from_pretrained(saved(tmp_path_factory, name), **options)

    return load


def velocity(policy):
    latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    return policy.velocity(latents, torch.tensor([0.9, 0.3]), policy.encode(PROMPTS))


def test_a_size_that_the_family_cannot_draw_is_refused(load):
    assert load("sd3", resolution=None).latent_shape == (4, 16, 16)  # the model's own
    assert load("flux-dev", resolution=[64, 32]).latent_shape == (4, 32, 16)
    assert load("flux2-klein", resolution=(64, 32)).latent_shape == (16, 16, 8)
    with pytest.raises(ValueError, match=r"resolution must have sides divisible by 4 for a FluxPipeline; got 34 x 34 \(height x width\)"):
        load("flux-dev", resolution=34)
    with pytest.raises(ValueError, match=r"resolution must be one side or \[height, width\] in pixels; got \[32\]"):
        load("flux-dev", resolution=[32])


def test_the_grid_of_flux_follows_the_size(load):
    small, large = load("flux-dev").sigmas(4), load("flux-dev", resolution=128).sigmas(4)
    assert (large[1:-1] > small[1:-1]).all()
    assert torch.equal(load("flux-schnell").sigmas(4), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))


def test_the_guidance_input_is_that_of_distilled_networks_alone(load):
    usual, strong = load("flux-dev"), load("flux-dev", guidance=7.0)
    assert (usual.family.guidance, strong.family.guidance, load("flux-schnell").family.guidance) == (3.5, 7.0, None)
    with torch.no_grad():
        assert not torch.allclose(velocity(usual), velocity(strong), atol=1e-5)
    with pytest.raises(ValueError, match=r"guidance is an input of guidance-distilled networks.*wrap the policy in Guided"):
        load("flux-schnell", guidance=3.5)


@pytest.mark.parametrize(("name", "family"), [("sd15", "StableDiffusion"), ("sdxl", "StableDiffusionXL")])
def test_the_number_of_text_tokens_is_not_a_unets(name, family, load):
    with pytest.raises(ValueError, match=rf"^max_sequence_length is of .* a {family} always has the tokens of its CLIP; leave it out"):
        load(name, max_sequence_length=5)


def test_a_step_distilled_klein_is_not_guided(load):
    policy = load("flux2-klein")
    policy.family.pipeline.register_to_config(is_distilled=True)
    with pytest.raises(ValueError, match=r"this FLUX.2 is distilled, so it cannot be guided by a second text"), torch.no_grad():
        velocity(Guided(policy, 4.0))


def test_unets_keep_their_levels(load):
    policy = load("sd15")
    sigmas = policy.sigmas(10)
    assert 0.93 < sigmas[0] < 0.94
    assert 0.02 < sigmas[-1] < 0.04  # set_alpha_to_one is false
    assert load("sdxl").sigmas(10)[-1] == 0
    assert policy.family.timestep(sigmas[:-1]).tolist() == list(range(999, 0, -100))
    with pytest.raises(ValueError, match="grid must be left out for a StableDiffusion"):
        load("sd15", grid=ShiftedGrid(3.0))
    with pytest.raises(ValueError, match="steps must be at most 1000, the number of levels that the UNet was trained on; got 1001"):
        policy.sigmas(1001)


@pytest.mark.parametrize(
    ("scheduler", "options", "scale", "last"),
    [
        (PNDMScheduler, {"set_alpha_to_one": False, "skip_prk_steps": True}, "unit", 0.028),  # what Stable Diffusion 1.5 ships with
        (DDIMScheduler, {"set_alpha_to_one": True}, "unit", 0.0),
        (EulerDiscreteScheduler, {"timestep_spacing": "leading"}, "unit", 0.0),  # Stable Diffusion XL
        (EulerDiscreteScheduler, {"timestep_spacing": "trailing"}, "top", 0.0),
        (EulerDiscreteScheduler, {"timestep_spacing": "trailing", "final_sigmas_type": "sigma_min"}, "top", 0.028),
        (DPMSolverMultistepScheduler, {}, "unit", 0.0),
    ],
)
def test_a_unets_prior_and_last_level_are_its_schedulers(scheduler, options, scale, last):
    pipeline = built(BUILD["sd15"])
    pipeline.scheduler = scheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **options)
    family = StableDiffusion(pipeline)
    top = float(family.sigmas(5)[0])
    assert family.prior(torch.ones(1)).item() == pytest.approx(top if scale == "top" else math.hypot(top, 1 - top), rel=1e-4)
    assert float(family.sigmas(5)[-1]) == pytest.approx(last, abs=1e-3)


def test_a_unet_that_predicts_something_else_is_refused():
    pipeline = built(BUILD["sd15"])
    pipeline.scheduler = DDIMScheduler(prediction_type="sample")
    with pytest.raises(ValueError, match="prediction_type must be epsilon or v_prediction; got 'sample'"):
        StableDiffusion(pipeline)


def test_stable_diffusion_3_goes_without_t5(tmp_path):
    plain = built(BUILD["sd3"])
    plain.register_modules(text_encoder_3=None, tokenizer_3=None)
    plain.save_pretrained(tmp_path)
    policy = FlowMatchingPolicy.from_pretrained(str(tmp_path), max_sequence_length=24, device="cpu")
    embeds, _, pooled, _ = plain.encode_prompt(list(PROMPTS), None, None, do_classifier_free_guidance=False, max_sequence_length=24)
    encoded = policy.encode(PROMPTS).tensors
    torch.testing.assert_close(encoded["embeds"], embeds)
    torch.testing.assert_close(encoded["pooled"], pooled)


def test_decoding_in_slices_gives_the_same_pictures(load):
    policy, sliced = load("z-image"), load("z-image", slicing=True, tiling=True)
    assert (sliced.family.pipeline.vae.use_slicing, sliced.family.pipeline.vae.use_tiling) == (True, True)
    latents = torch.randn(3, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(sliced.decode(latents), policy.decode(latents))


def test_an_attention_backend_is_taken_by_name(load):
    with torch.no_grad():
        torch.testing.assert_close(velocity(load("flux-dev", attention="_native_math")), velocity(load("flux-dev")), rtol=1e-4, atol=1e-5)
    load("flux-dev", attention="native")
    with pytest.raises(ValueError, match="must be one of the following"):
        load("flux-dev", attention="fastest")
