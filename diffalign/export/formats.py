"""Formats of exported weights."""

import copy
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffalign.core import Policy
from diffalign.core.unessential import unessential
from diffalign.core.words import require_word
from diffalign.durable import give_usual_mode, weights
from diffalign.policies import FlowMatchingPolicy
from diffalign.policies.diffusers import is_quantized

from .card import Card
from .layers import layers
from .unwrapping import pipeline_policy, saving_policy

Format = Literal["diffusers", "comfyui", "merged"]
FORMATS: tuple[str, ...] = get_args(Format)
COMFYUI_FILE = "comfyui_lora.safetensors"


def export(policy: Policy, folder: str | Path, form: Format, card: Card | None = None) -> Path:
    """Write the weights of a policy, and a model card `README.md`, into a folder.

    - "diffusers": adapters with their alpha, for `pipeline.load_lora_weights(folder)`
    - "comfyui": adapters in one file under the names that ComfyUI's loader gives the layers of the family
    - "merged": the whole pipeline, for `DiffusionPipeline.from_pretrained(folder)`; the only format after full fine-tuning. A policy
      without a pipeline that has a method `save` (`DigitsPolicy`) writes itself

    Args:
        policy: policy over a diffusers pipeline, or one that saves itself; it may be wrapped
        folder: output folder, which is created
        form: see above
        card: facts about the run

    Returns:
        The folder.

    Raises:
        ValueError: the policy is of neither kind, the format needs adapters and there are none, ComfyUI does not run the family, or the
            base to merge into is quantised.
    """
    require_word("format", form, Format)
    folder = Path(folder)
    inner, before = pipeline_policy(policy), weights(folder)
    if inner is None:
        return _of_its_own(policy, folder, form, card or Card())
    if form == "merged":
        if is_quantized(inner.network):
            raise ValueError(
                "the base is quantised, and merging into rounded weights would keep the rounding; build the run without quantization "
                "(--policy.quantization null)"
            )
        _merged(inner, folder)
    elif form == "comfyui":
        _comfyui(inner, folder)
    else:
        next(layers(inner))  # raises an error that says what to do if there is none
        inner.save_lora(str(folder))
    give_usual_mode(folder, before)
    with unessential(f"the model card of {folder}"):
        (folder / "README.md").write_text((card or Card()).text(inner, form, policy), encoding="utf-8")
    return folder


def usual_form(policy: Policy) -> Format:
    """Format that holds all that was trained: "diffusers" for a policy over a pipeline with adapters, else "merged"."""
    inner = pipeline_policy(policy)
    return "merged" if inner is None or not inner.adapters else "diffusers"


def _of_its_own(policy: Policy, folder: Path, form: Format, card: Card) -> Path:
    """Write the weights of a policy without a pipeline, by its own method `save`."""
    inner = saving_policy(policy)
    if inner is None:
        raise ValueError(
            f"only a policy over a diffusers pipeline, or one with a method save(folder), can be exported; got {type(policy).__name__}"
        )
    if form != "merged":
        raise ValueError(f"{type(inner).__name__} is no diffusers pipeline and has no LoRA; export it with --format merged")
    before = weights(folder)
    inner.save(str(folder))
    give_usual_mode(folder, before)
    (folder / "README.md").write_text(card.plain(policy), encoding="utf-8")
    return folder


def _comfyui(policy: FlowMatchingPolicy, folder: Path) -> None:
    kind = policy.family.comfyui
    if kind is None:
        raise ValueError(f"ComfyUI does not run the family {type(policy.family).__name__}; export it as diffusers or merged")
    tensors: dict[str, Tensor] = {}
    for layer in layers(policy):
        if kind == "unet":
            name, down, up = "lora_unet_" + layer.path.replace(".", "_"), "lora_down", "lora_up"
        else:
            name, down, up = f"transformer.{layer.path}", "lora_A", "lora_B"
        tensors |= {f"{name}.{down}.weight": layer.down, f"{name}.{up}.weight": layer.up, f"{name}.alpha": torch.tensor(layer.alpha)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / COMFYUI_FILE, metadata={"format": "pt", "base_model": policy.family.source})


def _merged(policy: FlowMatchingPolicy, folder: Path) -> None:
    network: Any = _on_host(policy.network)
    if policy.adapters:
        network.fuse_lora()
        network.unload_lora()
    pipeline = copy.copy(policy.family.pipeline)
    vars(pipeline)[policy.family.component] = network
    pipeline.save_pretrained(folder)


def _on_host(network: nn.Module) -> nn.Module:
    """Copy a network to the CPU, without gradients, because the device may have no memory for a second copy."""
    held: dict[int, Any] = {id(buffer): buffer.detach().to("cpu", copy=True) for buffer in network.buffers()}
    held |= {id(tensor): nn.Parameter(tensor.detach().to("cpu", copy=True), requires_grad=False) for tensor in network.parameters()}
    return copy.deepcopy(network, held)
