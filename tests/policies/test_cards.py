"""The code on model cards, run as it is written: it draws what the policy draws, whatever scheduler and files its base has."""

import re
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, PNDMScheduler
from original_names import latent_diffusion
from published_places import hub_of, other
from safetensors.torch import load_file, save_file
from tiny_pipelines import BUILD, built, saved

from diffalign.core import Euler, Guided, Progress, Prompt, Streams
from diffalign.export import Card, export
from diffalign.policies import FlowMatchingPolicy, LoRA, TDMPolicy
from diffalign.samplers import DeterministicSampler

PROMPT = "a lighthouse at night"
STEPS = 3  # does not divide 1000
CURVE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def load(path, **options):
    policy = FlowMatchingPolicy.from_pretrained(
        str(path), **{"lora": LoRA(rank=2, alpha=6), "resolution": 32, "device": "cpu", "kernel": Euler(), **options}
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return policy


@torch.no_grad()
def drawn(policy, steps=STEPS):
    """Latents [1, *] of a policy."""
    return DeterministicSampler(steps, samples=1).sample(policy, policy.encode([Prompt(PROMPT)]), Progress(0, 1), Streams(3)).samples


def code_of(folder):
    return re.search("```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)[1]


def by_card(folder, policy, monkeypatch, output="pt"):
    """What the code on the card in a folder draws from the policy's noise."""
    monkeypatch.chdir(folder)
    code = re.sub(r",?\n?\)\.images\[0\]", f", latents=latents, output_type={output!r}).images", code_of(folder))
    names = {"latents": Streams(3).normals(policy.latent_shape, "rollout", [0], [0])}
    exec(code.replace("three red circles", PROMPT).replace('image.save("picture.png")', ""), names)
    return names["image"]


SCHEDULERS = {
    "DDIM": DDIMScheduler(**CURVE, clip_sample=False, steps_offset=1, set_alpha_to_one=False),
    "DDIM, clipped": DDIMScheduler(**CURVE, clip_sample=True, prediction_type="v_prediction"),
    "PNDM of 1.5": PNDMScheduler(**CURVE, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1),
    "PNDM, v": PNDMScheduler(**CURVE, skip_prk_steps=True, set_alpha_to_one=True, steps_offset=1, prediction_type="v_prediction"),
    "Euler of XL": EulerDiscreteScheduler(**CURVE, timestep_spacing="leading", steps_offset=1),
    "Euler, Karras, v": EulerDiscreteScheduler(
        **CURVE, timestep_spacing="trailing", use_karras_sigmas=True, prediction_type="v_prediction"
    ),
    "Euler ancestral of turbo": EulerAncestralDiscreteScheduler(**CURVE, timestep_spacing="trailing", steps_offset=1),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_card_of_a_unet_takes_the_policys_steps_whatever_its_scheduler_does(name, scheduler, tmp_path, monkeypatch):
    pipeline = built(BUILD[name])
    pipeline.scheduler = SCHEDULERS[scheduler]
    pipeline.save_pretrained(tmp_path / "base")
    policy = load(tmp_path / "base")
    folder = export(policy, tmp_path / "out", "diffusers", Card(sampled=STEPS))
    latents = by_card(folder, policy, monkeypatch, "latent")
    wanted = policy.family.unscale(drawn(policy)) * policy.family.pipeline.vae.config.scaling_factor
    torch.testing.assert_close(latents, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize(("name", "negative"), [("sd3", "a blur"), ("sdxl", "")])
def test_the_negative_text_of_a_guided_student_has_its_tag(name, negative, tmp_path_factory, tmp_path, monkeypatch):
    inner = load(saved(tmp_path_factory, name))
    policy = Guided(TDMPolicy(inner, STEPS, tag=" in {steps} steps"), 3.0, negative)
    folder = export(policy, tmp_path, "diffusers")
    torch.testing.assert_close(by_card(folder, inner, monkeypatch), inner.decode(drawn(policy)), rtol=0, atol=2e-4)
    assert f'negative_prompt="{negative} in 3 steps"' in code_of(folder)


def test_guidance_inside_a_student_has_no_tag(tmp_path_factory, tmp_path, monkeypatch):
    inner = load(saved(tmp_path_factory, "sd3"))
    policy = TDMPolicy(Guided(inner, 3.0, "a blur"), STEPS, tag=" in {steps} steps")
    folder = export(policy, tmp_path, "diffusers")
    torch.testing.assert_close(by_card(folder, inner, monkeypatch), inner.decode(drawn(policy)), rtol=0, atol=2e-4)
    assert 'negative_prompt="a blur"' in code_of(folder)


@pytest.fixture
def same(tmp_path, monkeypatch):
    """Export a policy and hold its card against it; the code is the result."""

    def same(policy, forms=("diffusers", "merged")):
        pictures = policy.decode(drawn(policy))
        for form in forms:
            folder = export(policy, tmp_path / form, form, Card(sampled=STEPS))
            torch.testing.assert_close(by_card(folder, policy, monkeypatch), pictures, rtol=0, atol=2e-4)
        return (tmp_path / forms[0] / "README.md").read_text()

    return same


def test_a_card_names_the_sub_folder(tmp_path_factory, tmp_path, same):
    shutil.copytree(saved(tmp_path_factory, "sd3"), tmp_path / "models" / "base")
    card = same(load(tmp_path / "models", subfolder="base"))
    assert "| sub-folder | base |" in card


@pytest.mark.parametrize("alone", [True, False])
def test_a_card_names_the_variant(alone, tmp_path_factory, tmp_path, same):
    """Beside files of other numbers too; and text encoders in half precision are drawn with in that of the run."""
    plain = saved(tmp_path_factory, "sd3")
    pipeline = other(plain, tmp_path / "other")
    if not alone:
        shutil.copytree(plain, tmp_path / "base")
    pipeline.to(torch.float16).save_pretrained(tmp_path / "base", variant="fp16")
    card = same(load(tmp_path / "base", variant="fp16"))
    assert "| variant of the files | fp16 |" in card
    assert 'variant="fp16"' in card


@pytest.fixture
def hub(tmp_path, tmp_path_factory, monkeypatch):
    return hub_of(saved(tmp_path_factory, "sd15"), tmp_path / "hub", monkeypatch)


@pytest.mark.parametrize("where", [{}, {"revision": "v2"}, {"revision": "v2", "subfolder": "deep/inside"}])
def test_a_card_names_what_of_a_hub_id_it_was(where, hub, same):
    card = same(load("someone/model", **where), ("diffusers",))
    assert 'revision="v2"' in card if where else "revision" not in card


@pytest.fixture
def checkpoint(tmp_path_factory, tmp_path):
    """Files of one fine-tune with some of its parts, by the beginnings of the names that they hold."""
    file = tmp_path / "all.safetensors"
    save_file(latent_diffusion(other(saved(tmp_path_factory, "sd15"), tmp_path / "tuned")), file)

    def holding(*parts):
        part = tmp_path / f"{len(parts)}.safetensors"
        save_file({name: tensor for name, tensor in load_file(file).items() if name.startswith(parts)}, part)
        return str(part)

    return holding


DENOISER, AUTOENCODER, TEXTS = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."


@pytest.mark.parametrize(
    "parts", [(DENOISER,), (DENOISER, AUTOENCODER), (DENOISER, TEXTS), (DENOISER, AUTOENCODER, TEXTS)], ids=lambda parts: len(parts)
)
def test_a_card_takes_what_a_single_file_has(parts, checkpoint, tmp_path_factory, same):
    policy = load(saved(tmp_path_factory, "sd15"), single_file=checkpoint(*parts))
    card = same(policy)
    assert f"| weights in place of the base's | {policy.family.loaded_from.single_file} |" in card


@pytest.mark.parametrize("where", [{"revision": "v2"}, {"revision": "v2", "subfolder": "deep/inside"}])
def test_a_single_file_above_a_hub_id(where, hub, checkpoint, same):
    same(load("someone/model", single_file=checkpoint(DENOISER), **where), ("diffusers",))


def test_a_single_file_above_the_embedded_pipeline(tmp_path, same):
    options = {"max_sequence_length": 16, "resolution": None}
    moved = load("shapeworld", lora=None, **options).network
    save_file({name: tensor.contiguous() for name, tensor in moved.state_dict().items()}, tmp_path / "moved.safetensors")
    same(load("shapeworld", single_file=str(tmp_path / "moved.safetensors"), **options), ("diffusers",))
