"""Folders, files and settings of adapters as people have them, beyond the layouts of writers."""

import functools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from starts import World, written

world = functools.cache(World)


@pytest.fixture
def saved(tmp_path):
    here = world("sd3")
    network = here.with_peft(r=4, lora_alpha=8, target_modules=".*attn.to_q")
    return here, here.saved(network, tmp_path / "saved"), here.velocity(network)


def same(mine, theirs):
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def alphas(file, value):
    tensors = load_file(file)
    return tensors | {name.replace("lora_A.weight", "alpha"): value.clone() for name in tensors if "lora_A" in name}


def test_a_header_that_is_nested_without_end_is_refused(saved, tmp_path):
    here, file, _ = saved
    save_file(load_file(file), tmp_path / "deep.safetensors", {"lora_adapter_metadata": "[" * 100_000})
    with pytest.raises(ValueError, match=r"in the header of deep.safetensors is no JSON"):
        here.start(tmp_path / "deep.safetensors")


def test_links_into_a_cache_are_followed(saved, tmp_path):
    here, file, velocity = saved
    blob = shutil.copy(file, tmp_path / "3f2a")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / file.name).symlink_to(blob)
    same(here.start(tmp_path / "snapshot"), velocity)
    same(here.start(tmp_path / "snapshot" / file.name), velocity)


@pytest.mark.parametrize(
    "value", [torch.tensor(8), torch.tensor([8.0]), torch.tensor(8.0, dtype=torch.bfloat16)], ids=["int", "list", "half"]
)
def test_an_alpha_of_any_type_is_a_number(saved, tmp_path, value):
    here, file, velocity = saved
    same(here.start(written(tmp_path / "alpha", alphas(file, value))), velocity)


def test_a_path_of_the_home_folder_and_an_ending_in_capitals_are_read(saved, tmp_path, monkeypatch):
    here, file, velocity = saved
    shutil.copy(file, tmp_path / "LORA.SAFETENSORS")
    monkeypatch.setenv("HOME", str(tmp_path))
    same(here.start("~/LORA.SAFETENSORS"), velocity)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_alpha_that_is_no_number_is_refused(saved, tmp_path, value):
    here, file, _ = saved
    with pytest.raises(ValueError, match=r"alpha' in .* holds numbers that are not finite"):
        here.start(written(tmp_path / "alpha", alphas(file, torch.tensor(value))))


def test_folders_of_checkpoints_are_no_start_by_themselves(saved, tmp_path):
    here, file, velocity = saved
    shutil.copytree(file.parent, tmp_path / "run" / "checkpoint-100")
    with pytest.raises(ValueError, match="where there is none"):
        here.start(tmp_path / "run")
    same(here.start(tmp_path / "run" / "checkpoint-100"), velocity)


def test_a_folder_with_two_adapters_that_differ_is_refused(saved):
    here, file, velocity = saved
    other = {name.replace("transformer.", "base_model.model.", 1): 2 * tensor for name, tensor in load_file(file).items()}
    save_file(other, file.parent / "adapter_model.safetensors")
    (file.parent / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    with pytest.raises(ValueError, match=r"holds both pytorch_lora_weights.safetensors and adapter_model.safetensors; name the file"):
        here.start(file.parent)
    same(here.start(file), velocity)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number_is_refused(saved, scale):
    here, file, _ = saved
    with pytest.raises(ValueError, match="start_scale"):
        here.start(file, start_scale=scale)


def test_a_scale_without_a_start_is_refused():
    with pytest.raises(ValueError, match="start_scale"):
        world("sd3").network(rank=2, start_scale=0.5)


@pytest.mark.parametrize("targets", [[], "", [""], ["to_q "]])
def test_targets_that_are_nothing_are_refused(targets):
    with pytest.raises(ValueError, match=r"LoRA.targets must .*name"):
        world("sd3").network(rank=2, targets=targets)


def test_a_layer_that_cannot_be_adapted_is_named():
    with pytest.raises(ValueError, match=r"LoRA.rank must be divisible by the groups of a convolution; .*ff.conv_depth"):
        world("sana").network(rank=2, targets=["ff.conv_depth", "attn1.to_q"])
