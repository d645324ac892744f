"""Checks of what `FlowMatchingPolicy.from_pretrained` is asked for, before anything is loaded."""

from collections.abc import Sequence
from typing import Any, Literal

import torch

from diffalign.core.words import require_word

from .diffusers import Family, Quantization
from .lora import LoRA

Dtype = Literal["float32", "bfloat16", "float16"]


def read_choices(lora: Any, dtype: Any, quantization: str | None, compute: str | None, trainable: bool) -> tuple[LoRA | None, Dtype]:
    """Read the adapters and the type of the base, and check that the choices go together.

    Args:
        lora: adapters, a dict of their arguments as in a run file, or None
        dtype: name of a type, or torch's type
        quantization: name of the quantisation of the base
        compute: name of the type of the products
        trainable: whether anything is trained

    Raises:
        ValueError: a word is unknown, or half-precision or quantised weights would be trained.
    """
    lora = LoRA(**lora) if isinstance(lora, dict) else lora
    dtype = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    require_word("dtype", dtype, Dtype)
    require_word("quantization", quantization, Quantization | None)
    require_word("compute", compute, Literal["bfloat16"] | None)
    if lora is not None and not isinstance(lora, LoRA):
        raise ValueError(f"lora must be a LoRA, a dict of its arguments, or None; got {type(lora).__name__}")
    if trainable and lora is None and quantization is not None:
        raise ValueError(
            f"quantization must be left out when all weights are trained, because {quantization} has no gradient; or give lora, or "
            "trainable: false"
        )
    if trainable and lora is None and dtype != "float32":
        raise ValueError(
            f"dtype must be float32 when all weights are trained (an optimizer loses small steps in {dtype}); or give lora, or "
            "trainable: false"
        )
    if compute is not None and dtype != "float32":
        raise ValueError(f"compute must be left out if dtype is {dtype}: it is the type in which float32 weights are multiplied")
    return lora, dtype


def sides(resolution: int | Sequence[int] | None) -> tuple[int, int] | None:
    """Read a resolution: one side or [height, width] in pixels."""
    if resolution is None:
        return None
    both = (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)
    if len(both) != 2:
        raise ValueError(f"resolution must be one side or [height, width] in pixels; got {resolution}")
    return both[0], both[1]


def enable(family: Family, verb: str) -> None:
    """Switch slicing or tiling of the autoencoder on."""
    found = getattr(family.pipeline.vae, f"enable_{verb}", None)
    if found is None:
        raise ValueError(f"{verb} must be off: the autoencoder {type(family.pipeline.vae).__name__} does not have it")
    found()
