"""Every file that a run may start at gives the velocity that plain diffusers, or its writer, has with it."""

import copy
import functools
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from starts import WRITERS, World, kohya, randomized, written

from diffalign.export import export

FAMILIES = ("sd3", "flux-dev", "flux2-klein", "z-image", "qwen-image", "sana", "sd15", "sdxl")
world = functools.cache(World)
ENDS = r".*(to_q|to_v)"


def same(mine, theirs):
    # float32 rounds relatively: a velocity of 20, as of the UNets, has a last bit of 2e-6
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("writer", WRITERS)
def test_files_of_other_writers_begin_where_plain_diffusers_does(writer, tmp_path):
    name, tensors = WRITERS[writer]
    here = world(name)
    file = written(tmp_path, tensors(here))
    mine = here.start(file)
    same(mine, here.elsewhere(file))
    assert (mine - here.plain).abs().max() > 1e-3


SETTINGS = {
    "alpha": {},
    "rank-stabilised": {"use_rslora": True},
    "patterns": {"rank_pattern": {"to_v": 6}, "alpha_pattern": {r".*0\.attn1?\.to_q": 1, "to_v": 9}},
    "patterns, rank-stabilised": {"rank_pattern": {"to_v": 6}, "alpha_pattern": {"to_v": 9}, "use_rslora": True},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", ["sd3", "sd15"])
def test_settings_in_the_header_count(name, settings, tmp_path):
    here = world(name)
    network = here.with_peft(r=4, lora_alpha=7, target_modules=ENDS, **settings)
    file = here.saved(network, tmp_path)
    mine = here.start(file)
    same(mine, here.velocity(network))
    same(mine, here.elsewhere(file))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_folders_of_peft_are_read_with_their_configuration(settings, tmp_path):
    here = world("sd3")
    model = get_peft_model(copy.deepcopy(here.base), LoraConfig(r=4, lora_alpha=7, target_modules=["to_q", "to_v"], **settings))
    randomized(model).save_pretrained(str(tmp_path))
    same(here.start(tmp_path), here.velocity(model.base_model.model))


def test_without_a_header_diffusers_own_names_mean_alpha_is_the_rank(tmp_path):
    here = world("sd3")
    file = here.saved(here.with_peft(r=4, lora_alpha=7, target_modules=ENDS), tmp_path, metadata=False)
    same(here.start(file), here.elsewhere(file))


@pytest.mark.parametrize("form", ["diffusers", "comfyui"])
@pytest.mark.parametrize("name", FAMILIES)
def test_own_exports_are_read_back(name, form, tmp_path):
    if (name, form) == ("sana", "comfyui"):
        pytest.skip("ComfyUI does not run it")
    here = world(name)
    network = randomized(here.network(rank=2, alpha=6))
    same(here.start(export(here.policy(network), tmp_path, form)), here.velocity(network))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_ddp_and_compilation_say_nothing(prefix, tmp_path):
    here = world("sd3")
    network = here.with_peft(r=4, lora_alpha=7, target_modules=ENDS)
    tensors = load_file(here.saved(network, tmp_path))
    settings = {f"transformer.{key}": value for key, value in {"r": 4, "lora_alpha": 7}.items()}
    file = written(tmp_path / "spread", {prefix + name: tensor for name, tensor in tensors.items()}, settings)
    same(here.start(file), here.velocity(network))


def test_flat_names_mean_the_same_under_each_prefix(tmp_path):
    here = world("sd3")
    tensors = kohya(here, "transformer_blocks.0.attn.to_q", "proj_out", alpha=2)
    velocities = [
        here.start(written(tmp_path / prefix, {name.replace("lora_unet_", prefix, 1): tensor for name, tensor in tensors.items()}))
        for prefix in ("lora_unet_", "lora_transformer_", "lycoris_")
    ]
    dotted = here.pairs({f"diffusion_model.{path}": path for path in ("transformer_blocks.0.attn.to_q", "proj_out")}, alpha=2)
    for velocity in velocities:
        same(velocity, here.start(written(tmp_path / "dotted", dotted)))


def test_each_layer_has_its_own_alpha(tmp_path):
    here = world("sd15")
    path = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_"
    tensors = kohya(here, f"{path}q", f"{path}k", alpha=2) | kohya(here, f"{path}v", rank=6, alpha=9)
    mine = here.network(rank=8, alpha=3, start=str(written(tmp_path, tensors)))
    for end in "qkv":
        stem = f"lora_unet_{path.replace('.', '_')}{end}"
        down, up = tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"]
        adapted = mine.get_submodule(path + end)
        same(adapted.get_delta_weight("default"), float(tensors[f"{stem}.alpha"]) / len(down) * up @ down)


def test_the_alpha_that_counts_is_the_denoisers(tmp_path):
    here = world("sd3")
    network = here.with_peft(r=4, lora_alpha=7, target_modules=ENDS)
    tensors = load_file(here.saved(network, tmp_path))
    settings = {"text_encoder.lora_alpha": 100, "text_encoder.r": 1, "transformer.lora_alpha": 7, "transformer.r": 4}
    same(here.start(written(tmp_path / "two", tensors, settings)), here.velocity(network))


def test_tensors_without_effect_are_passed_over(tmp_path):
    here = world("flux-dev")
    tensors = WRITERS["kohya, FLUX by its authors' names"][1](here)
    nothing = {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 4),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.zeros(4, 2),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(2.0),
        "lora_unet_double_blocks_0_img_attn_qkv.diff_b": torch.zeros(96),
    }
    same(here.start(written(tmp_path, tensors | nothing)), here.start(written(tmp_path / "less", tensors)))


def test_bare_paths_are_read_where_something_says_the_alpha(tmp_path):
    here = world("sd3")
    network = here.with_peft(r=4, lora_alpha=7, target_modules=ENDS)
    tensors = load_file(here.saved(network, tmp_path / "whole"))
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    alphas = {name.replace("lora_A.weight", "alpha"): torch.tensor(7.0) for name in bare if "lora_A" in name}
    same(here.start(written(tmp_path / "alphas", bare | alphas)), here.velocity(network))
    file = written(tmp_path / "beside", bare)
    (tmp_path / "beside" / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 7}))
    same(here.start(file), here.velocity(network))
    same(here.start(file.parent, start_scale=0.0), here.plain)


def test_half_precision_files_are_read(tmp_path):
    here = world("sd3")
    tensors = here.pairs({"transformer.transformer_blocks.0.attn.to_q": "transformer_blocks.0.attn.to_q"})
    file = written(tmp_path, {name: tensor.bfloat16() for name, tensor in tensors.items()})
    same(here.start(file), here.elsewhere(file))


def test_a_whole_path_is_that_layer_alone(tmp_path):
    here = world("flux-dev")
    adapted = {name.split(".lora_")[0] for name in here.policy(here.network(rank=2, targets=["proj_out"])).own}
    assert adapted == {"proj_out"}  # and not single_transformer_blocks.0.proj_out
    adapted = {name.split(".lora_")[0] for name in here.policy(here.network(rank=2, targets=["0.proj_out", "attn.to_k"])).own}
    assert adapted == {"single_transformer_blocks.0.proj_out", "single_transformer_blocks.0.attn.to_k", "transformer_blocks.0.attn.to_k"}
    network = randomized(here.network(rank=2, targets=["proj_out"]))
    folder = export(here.policy(network), tmp_path, "diffusers")
    same(here.elsewhere(folder), here.velocity(network))
    same(here.start(folder), here.velocity(network))
    settings = json.loads(_header(folder)["lora_adapter_metadata"])
    assert settings["transformer.r"] == 2


def _header(folder):
    from safetensors import safe_open

    with safe_open(folder / "pytorch_lora_weights.safetensors", "pt") as content:
        return content.metadata()
