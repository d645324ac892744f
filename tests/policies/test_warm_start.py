"""Adapters that exist already as the start of a run."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipelines import saved

from diffalign.core import Prompt
from diffalign.policies import FlowMatchingPolicy, LoRA
from diffalign.policies.saved_tensors import FILE


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved(tmp_path_factory, "sd3")


def load(base, **lora):
    return FlowMatchingPolicy.from_pretrained(base, lora=LoRA(**lora), max_sequence_length=16, device="cpu")


@pytest.fixture(scope="module")
def student(base):
    policy = load(base, rank=2, alpha=6, targets=["attn.to_q", "attn.to_v"])
    with torch.no_grad():
        for name, parameter in policy.trainable_parameters().items():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) / 3)
    return policy


@pytest.fixture
def folder(student, tmp_path):
    student.save_lora(str(tmp_path / "student"))
    return tmp_path / "student"


def velocity(policy):
    latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return policy.velocity(latents, torch.tensor([0.9, 0.3]), policy.encode([Prompt("a"), Prompt("b")]))


@pytest.mark.parametrize("lora", [{"rank": 2, "alpha": 6}, {"rank": 5, "alpha": 1}])
def test_a_run_starts_at_the_saved_weights_whatever_its_own_rank_and_alpha(base, student, folder, lora):
    policy = load(base, start=str(folder), **lora)
    assert {name.split(".lora_")[0] for name in policy.own} == {name.split(".lora_")[0] for name in student.own}
    torch.testing.assert_close(velocity(policy), velocity(student), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(velocity(policy.fork(pristine=True)), velocity(student.fork(pristine=True)))
    assert not torch.allclose(velocity(policy), velocity(policy.fork(pristine=True)), atol=1e-2)


def test_a_scale_is_part_of_the_start(base, student, folder):
    eighth = load(base, rank=2, alpha=6, start=str(folder / FILE), start_scale=0.125)
    with torch.no_grad():
        smaller = student.fork()
        for name in smaller.adapters:
            dict(smaller.network.named_parameters())[name].mul_(0.125)
    torch.testing.assert_close(velocity(eighth), velocity(smaller), rtol=1e-4, atol=1e-5)


def renamed(folder, change, alpha=None):
    tensors = {change(name): tensor for name, tensor in load_file(folder / FILE).items()}
    save_file({**tensors, **(alpha(tensors) if alpha else {})}, folder / FILE)


def test_names_of_other_writers_are_read(base, student, folder):
    renamed(folder, lambda name: name.replace("transformer.", "base_model.model.", 1))  # peft, whose alpha stands beside
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 6}))
    torch.testing.assert_close(velocity(load(base, start=str(folder))), velocity(student), rtol=1e-4, atol=1e-5)
    (folder / "adapter_config.json").unlink()
    down_up = {"lora_A": "lora.down", "lora_B": "lora.up"}
    renamed(
        folder,
        lambda name: name.replace("lora_A", down_up["lora_A"]).replace("lora_B", down_up["lora_B"]),
        lambda tensors: {name.replace(".lora.down.weight", ".alpha"): torch.tensor(6.0) for name in tensors if "down" in name},
    )
    torch.testing.assert_close(velocity(load(base, start=str(folder))), velocity(student), rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused(base, folder, tmp_path):
    with pytest.raises(ValueError, match=r"LoRA.rank must be at least that of LoRA.start.*has rank 2 .* the adapter has rank 1 "):
        load(base, rank=1, start=str(folder))
    with pytest.raises(ValueError, match=r"LoRA.targets must cover the layers of LoRA.start; 'transformer_blocks.0.attn.to_q' of SD3"):
        load(base, start=str(folder), targets=["attn.to_k"])
    with pytest.raises(
        ValueError, match=r"LoRA.start must be a safetensors file, or a folder with pytorch_lora_weights.safetensors or .*; got"
    ):
        load(base, start=str(tmp_path / "nowhere"))


def test_positional_files_are_refused_with_the_reason(base, tmp_path):
    torch.save({"ema_parameters": [torch.zeros(2, 2)]}, tmp_path / "ema.pt")
    with pytest.raises(ValueError, match=r"ema.pt is no safetensors file. A positional list, such as the EMA of a training state"):
        load(base, start=str(tmp_path / "ema.pt"))
    save_file({"0": torch.zeros(2, 2), "1": torch.zeros(2, 2)}, tmp_path / "ema.safetensors")
    with pytest.raises(ValueError, match=r"named by layer.*down and up for each.*holds 2 tensors \(first: '0'\)"):
        load(base, start=str(tmp_path / "ema.safetensors"))
