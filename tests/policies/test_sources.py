"""Folders, repositories and files as they are published: variants, pieces, sub-folders, revisions, one file for everything."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from original_names import latent_diffusion, z_image
from published_places import COMMITS, hub_of, other
from safetensors.torch import load_file, save_file
from tiny_pipelines import saved

from diffalign import Prompt
from diffalign.policies import FlowMatchingPolicy, LoRA
from diffalign.policies.diffusers.mapped import stored_dtype
from diffalign.policies.diffusers.source import variant_of

PROMPTS = [Prompt("a red cube"), Prompt("two green cats")]


def load(path, **options):
    return FlowMatchingPolicy.from_pretrained(str(path), **{"lora": LoRA(rank=2), "resolution": 32, "device": "cpu", **options})


@torch.no_grad()
def answer(policy):
    """Velocity and pictures: denoiser, text encoders and autoencoder all have their say."""
    latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    return torch.cat(
        [policy.velocity(latents, torch.tensor([0.9, 0.3]), policy.encode(PROMPTS)).flatten(), policy.decode(latents).flatten()]
    )


def test_a_folder_with_files_of_a_variant_alone(tmp_path_factory, tmp_path):
    plain = saved(tmp_path_factory, "sd3")
    pipeline = DiffusionPipeline.from_pretrained(plain, torch_dtype=torch.float16)
    pipeline.save_pretrained(tmp_path, variant="fp16")
    assert not list(tmp_path.rglob("model.safetensors"))
    half = {name: parameter.float() for name, parameter in pipeline.transformer.named_parameters()}
    policy = load(tmp_path, variant="fp16", lora=None)
    assert all(torch.equal(parameter, half[name]) for name, parameter in policy.network.named_parameters())
    assert stored_dtype(tmp_path / "transformer", "fp16") == torch.float16
    with pytest.raises(ValueError, match=r"has weights of the variant fp16 alone, and no variant was asked for\. Give variant\."):
        load(tmp_path)
    with pytest.raises(ValueError, match="has weights of the variant fp16 alone, and the variant 'bf16' was asked for"):
        load(tmp_path, variant="bf16")
    with pytest.raises(ValueError, match="variant=fp16"):
        load(plain, variant="fp16")


def test_weights_in_pieces(tmp_path_factory, tmp_path):
    folder = saved(tmp_path_factory, "flux-dev")
    pipeline = DiffusionPipeline.from_pretrained(folder)
    for name, variant in (("plain", None), ("half", "fp16")):
        pipeline.save_pretrained(tmp_path / name, max_shard_size="100KB", variant=variant)
        assert len(list((tmp_path / name / "transformer").glob("*.safetensors"))) > 1
        assert stored_dtype(tmp_path / name / "transformer", variant) == torch.float32
        assert torch.equal(answer(load(tmp_path / name, variant=variant)), answer(load(folder)))


def test_names_of_variants():
    names = {"model.safetensors": None, "model.fp16.safetensors": "fp16", "diffusion_pytorch_model-00001-of-00002.safetensors": None}
    names |= {"diffusion_pytorch_model.fp16-00001-of-00002.safetensors": "fp16", "diffusion_pytorch_model.non_ema.bin": "non_ema"}
    assert {name: variant_of(name) for name in names} == names


@pytest.fixture
def hub(tmp_path, tmp_path_factory, monkeypatch):
    return hub_of(saved(tmp_path_factory, "sd3"), tmp_path / "hub", monkeypatch)


def test_revisions_and_sub_folders_of_a_hub_id(hub, tmp_path_factory):
    snapshots = {name: answer(load(hub / "snapshots" / commit)) for name, commit in COMMITS.items()}
    assert torch.equal(answer(load("someone/model")), snapshots["main"])
    assert torch.equal(answer(load("someone/model", revision="v2")), snapshots["v2"])
    assert torch.equal(answer(load("someone/model", revision=COMMITS["v2"])), snapshots["v2"])
    assert not torch.equal(snapshots["main"], snapshots["v2"])
    assert torch.equal(answer(load("someone/model", revision="v2", subfolder="deep/inside")), snapshots["main"])


def test_a_sub_folder_of_a_folder(tmp_path_factory, tmp_path):
    shutil.copytree(saved(tmp_path_factory, "sd3"), tmp_path / "models" / "base")
    assert torch.equal(answer(load(tmp_path / "models", subfolder="base")), answer(load(tmp_path / "models" / "base")))
    with pytest.raises(ValueError, match=r"revision is of a hub id; policy.path .* is a folder"):
        load(tmp_path / "models" / "base", revision="main")
    with pytest.raises(ValueError, match=r"must be a diffusers pipeline folder .* with subfolder 'absent'"):
        load(tmp_path / "models", subfolder="absent")


def test_a_denoiser_in_one_file_under_its_authors_names(tmp_path_factory, tmp_path):
    folder = saved(tmp_path_factory, "z-image")
    wanted = other(folder, tmp_path / "other")
    for prefix in ("", "model.diffusion_model."):
        save_file({prefix + name: tensor for name, tensor in z_image(wanted.transformer).items()}, tmp_path / "z.safetensors")
        policy = load(folder, single_file=str(tmp_path / "z.safetensors"), lora=None)
        assert all(torch.equal(value, policy.network.state_dict()[name]) for name, value in wanted.transformer.state_dict().items())
        latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            torch.testing.assert_close(policy.decode(latents), load(folder).decode(latents))  # the rest is the folder's


def test_a_denoiser_in_one_file_under_names_of_diffusers(tmp_path_factory, tmp_path):
    folder = saved(tmp_path_factory, "flux-dev")
    wanted = other(folder, tmp_path / "other")
    save_file(wanted.transformer.state_dict(), tmp_path / "flux.safetensors")
    policy = load(folder, single_file=str(tmp_path / "flux.safetensors"), lora=None)
    assert all(torch.equal(value, policy.network.state_dict()[name]) for name, value in wanted.transformer.state_dict().items())


def test_everything_in_one_file(tmp_path_factory, tmp_path):
    folder = saved(tmp_path_factory, "sd15")
    wanted = other(folder, tmp_path / "other")
    save_file(latent_diffusion(wanted), tmp_path / "checkpoint.safetensors")
    cache = str(tmp_path / "encodings")
    base = answer(load(folder, cache=cache))
    whole = answer(load(folder, cache=cache, single_file=str(tmp_path / "checkpoint.safetensors")))
    torch.testing.assert_close(whole, answer(load(tmp_path / "other")))
    assert not torch.allclose(whole, base, atol=1e-3)
    parts = {name: tensor for name, tensor in load_file(tmp_path / "checkpoint.safetensors").items() if "cond_stage_model" not in name}
    save_file(parts, tmp_path / "without_texts.safetensors")
    policy = load(folder, cache=cache, single_file=str(tmp_path / "without_texts.safetensors"))
    assert torch.equal(policy.encode(PROMPTS).tensors["embeds"], load(folder, cache=cache).encode(PROMPTS).tensors["embeds"])
    latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(policy.decode(latents), load(tmp_path / "other").decode(latents))


def test_a_file_that_does_not_fit_is_refused(tmp_path_factory, tmp_path, monkeypatch):
    folder = saved(tmp_path_factory, "z-image")
    tensors = z_image(DiffusionPipeline.from_pretrained(folder).transformer)
    file = str(tmp_path / "z.safetensors")

    def refused(content, message):
        save_file(content, file)
        with pytest.raises(ValueError, match=message):
            load(folder, single_file=file)

    first = next(iter(tensors))
    refused({name: tensor for name, tensor in tensors.items() if name != first}, "lacks weights that a ZImageTransformer2DModel has")
    refused({**tensors, "control.weight": torch.zeros(2)}, r"has no place for: control\.weight$")
    refused({**tensors, first: torch.zeros(3, 3)}, r"diffusers cannot make a ZImageTransformer2DModel of .* Is it for another model")
    refused({**tensors, "text_encoders.x.weight": torch.zeros(2)}, r"has no place for: text_encoders\.x\.weight$")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="single_file: diffusers cannot make"):
        load(folder, single_file=str(tmp_path / "broken.safetensors"))
    for name in ("absent.safetensors", "model.ckpt"):
        with pytest.raises(ValueError, match="single_file must be a safetensors file on this machine"):
            load(folder, single_file=str(tmp_path / name))
    with pytest.raises(
        ValueError, match=r"got the file .* Give the pipeline that it belongs to as path.* that is 'Tongyi-MAI/Z-Image-Turbo'"
    ):
        load(file)
    monkeypatch.setenv("HOME", str(Path(file).parent))
    with pytest.raises(ValueError, match=r"single_file\. By the names in it that is 'Tongyi-MAI/Z-Image-Turbo'"):
        load(f"~/{Path(file).name}")
    save_file({"weight": torch.zeros(2)}, tmp_path / "unknown.safetensors")
    with pytest.raises(ValueError, match=r"and the file as single_file\.$"):
        load(tmp_path / "unknown.safetensors")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        load(tmp_path / "broken.safetensors")
    other_model = saved(tmp_path_factory, "flux-dev")
    with pytest.raises(ValueError, match=r"diffusers cannot make a FluxTransformer2DModel of"):
        load(other_model, single_file=file)
