"""Adapter of Stable Diffusion XL (arXiv:2307.01952)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .unet import UNetFamily


class StableDiffusionXL(UNetFamily):
    """Stable Diffusion XL: tokens of two CLIPs, the pooled second one, and the image size. An empty negative text becomes zeros."""

    pipelines = ("StableDiffusionXLPipeline",)
    optional = ("feature_extractor", "image_encoder")
    usual_guidance = 5.0

    def encode(self, prompts: Sequence[str]) -> Mapping[str, Tensor]:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(list(prompts), device=self.device, do_classifier_free_guidance=False)
        return {"embeds": embeds, "pooled": pooled}

    def encode_negative(self, prompt: str) -> Mapping[str, Tensor]:
        tensors = self.encode([prompt])
        if prompt or not self.pipeline.config.get("force_zeros_for_empty_prompt", True):
            return tensors
        return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}

    def extra(self, tensors: Mapping[str, Tensor], sides: Sequence[int]) -> dict[str, Any]:
        pooled = tensors["pooled"].to(self.dtype)
        height, width = (side * self.pipeline.vae_scale_factor for side in sides)
        numbers = height, width, 0, 0, height, width  # original size, crop, target size
        sizes = self.on_device((numbers, pooled.dtype), lambda: torch.tensor(numbers, dtype=pooled.dtype), pooled.device)
        return {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes.expand(len(pooled), -1)}}
