"""Adapters between diffusers pipelines and the house conventions: one small file per model family."""

from typing import Any

import torch

from diffalign.embedded import SHAPEWORLD

from .family import Family
from .sd3 import StableDiffusion3

FAMILIES: tuple[type[Family], ...] = (StableDiffusion3,)

__all__ = ["FAMILIES", "Family", "StableDiffusion3", "load_family"]


def load_family(path: str, dtype: torch.dtype, device: torch.device, max_sequence_length: int | None) -> tuple[Family, Any]:
    """The family and the denoiser of a pipeline folder or hub id.

    Raises:
        ValueError: no pipeline there, or one of a class that no family serves.
    """
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    folder = str(SHAPEWORLD / "model") if path == "shapeworld" else path
    try:
        config = DiffusionPipeline.load_config(folder)
        name = config["_class_name"]
    except (OSError, KeyError) as error:
        raise ValueError(
            f"policy.path must be a diffusers pipeline folder (with model_index.json), a hub id, or 'shapeworld'; got {path!r}: {error}"
        ) from error
    for family in FAMILIES:
        if name in family.pipelines:
            absent = {part: None for part in family.optional if (config.get(part) or [None])[0] is None}
            pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype, **absent).to(device)
            return family(pipeline, max_sequence_length), pipeline.transformer
    known = ", ".join(pipeline for family in FAMILIES for pipeline in family.pipelines)
    raise ValueError(
        f"policy.path: {path!r} is a {name}, and no adapter serves that class. Known: {known}. "
        "To add one, write a Family (docs/extending.md) and build FlowMatchingPolicy(network, family)."
    )
