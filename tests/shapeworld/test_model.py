"""The pipeline that ships with the package, through plain diffusers and through the policy."""

import json

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from diffalign.core import Progress, Prompt, Streams
from diffalign.embedded import SHAPEWORLD
from diffalign.policies import FlowMatchingPolicy
from diffalign.prompts import read_prompts
from diffalign.samplers import DeterministicSampler
from diffalign.shapeworld import FAMILIES, parse, prompt_split
from diffalign.shapeworld.networks import tokenizer

CAPTIONS = ["three red circles", 'the text "K7" in blue']


@pytest.fixture(scope="module")
def pipeline():
    pipe = StableDiffusion3Pipeline.from_pretrained(SHAPEWORLD / "model")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_every_word_is_one_token(pipeline):
    assert pipeline.tokenizer.model_max_length == pipeline.tokenizer_2.model_max_length == 16
    for tokens in (pipeline.tokenizer, tokenizer()):
        assert len(tokens("a green triangle left of a yellow circle").input_ids) == 8 + 2
        assert len(tokens('the text "K7" in blue').input_ids) == 2 + 4 + 2 + 2  # the text, " K 7 ", in blue, start and end
        assert tokens("six purple crosses").input_ids == pipeline.tokenizer("six purple crosses").input_ids


@pytest.mark.parametrize("length", [16, 256])
def test_the_policy_draws_what_plain_diffusers_draws(pipeline, length):
    policy = FlowMatchingPolicy.from_pretrained("shapeworld", max_sequence_length=length)
    condition, streams = policy.encode([Prompt(caption) for caption in CAPTIONS]), Streams(3)
    trajectories = DeterministicSampler(steps=5, samples=1).sample(policy, condition, Progress(0, 1), streams)
    noise = trajectories.latents[trajectories.level == 0]
    with torch.no_grad():
        images = pipeline(
            CAPTIONS,
            height=64,
            width=64,
            latents=noise,
            num_inference_steps=5,
            guidance_scale=1.0,
            max_sequence_length=length,
            output_type="pt",
        ).images
        torch.testing.assert_close(policy.decode(trajectories.samples), images, atol=1e-4, rtol=0)


def test_the_t5_slot_is_silent(pipeline):
    embeds = pipeline.encode_prompt(CAPTIONS, None, None, do_classifier_free_guidance=False, max_sequence_length=16)[0]
    assert embeds.shape == (2, 32, 128)
    assert embeds[:, :16].abs().min(dim=-1).values.max() > 0
    assert embeds[:, 16:].abs().max() == 0


def test_the_autoencoder_knows_the_pictures(pipeline):
    from shapeworld_pretrain import render, to_pixels

    images, _ = render(16, seed=12345)
    pixels = to_pixels(images)
    with torch.no_grad():
        latents = pipeline.vae.encode(pixels).latent_dist.mean
        error = (pipeline.vae.decode(latents).sample - pixels).abs().mean() / 2
    assert error < 0.03
    assert 0.5 < latents.std(dim=(0, 2, 3)).min() < latents.std(dim=(0, 2, 3)).max() < 2


def test_files_are_small_and_documented():
    folder = SHAPEWORLD / "model"
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 15e6
    assert "Accuracy" in (folder / "README.md").read_text()
    assert json.loads((folder / "training.json").read_text())["history"]


@pytest.mark.parametrize("family", FAMILIES)
def test_shipped_lists_are_the_grammars(family):
    train, held_out = ([str(prompt) for prompt in read_prompts(f"shapeworld/{family}{end}")] for end in ("", "-held-out"))
    assert (train, held_out) == prompt_split(family)
    assert not set(train) & set(held_out)
    assert {parse(caption).family for caption in train + held_out} == {family}
