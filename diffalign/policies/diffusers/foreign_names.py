"""Conversion of adapters with the names of a model's first authors, by diffusers' own functions."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def converted(pipeline: Any, config: Any, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Rename and split pairs of matrices to diffusers' names, as `pipeline.load_lora_weights` does.

    Args:
        pipeline: pipeline whose class knows the conversion
        config: configuration of its denoiser
        tensors: matrices without alphas, which must have been multiplied in before

    Raises:
        ValueError: diffusers does not know the names, or would drop some of the tensors; a tensor is empty.
    """
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            raise ValueError(f"{name!r} is empty, of shape {list(tensor.shape)}")
    numbers = {name: float(number) for number, name in enumerate(tensors, start=1)}
    marked = _renamed(pipeline, config, {name: torch.tensor(numbers[name]).expand(tensor.shape) for name, tensor in tensors.items()})
    kept: set[float] = set()
    for tensor in marked.values():
        flat = tensor.reshape(len(tensor), -1)
        kept |= {*flat[0].tolist(), *flat[:, 0].tolist()}
    dropped = [name for name, number in numbers.items() if number not in kept]
    if dropped:
        raise ValueError(f"{dropped[0]!r} would be dropped")
    return _renamed(pipeline, config, tensors)


def _renamed(pipeline: Any, config: Any, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    from diffusers.loaders.lora_pipeline import StableDiffusionXLLoraLoaderMixin

    if not callable(getattr(type(pipeline), "lora_state_dict", None)):
        raise ValueError(f"{type(pipeline).__name__} reads no LoRA")
    told = {"unet_config": config} if isinstance(pipeline, StableDiffusionXLLoraLoaderMixin) else {}
    try:
        result = type(pipeline).lora_state_dict(dict(tensors), **told)
    except Exception as error:  # conversions fail in many ways: missing keys, assertions on sizes, keys that are left over
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{type(error).__name__}: {lines[0][:160]}") from error
    renamed: Mapping[str, Tensor] = result[0] if isinstance(result, tuple) else result
    return renamed
