"""Adapter of Stable Diffusion 1.x and 2.x (arXiv:2112.10752)."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .unet import UNetFamily


class StableDiffusion(UNetFamily):
    """Stable Diffusion 1.x and 2.x: CLIP tokens."""

    pipelines = ("StableDiffusionPipeline",)
    optional = ("safety_checker", "feature_extractor", "image_encoder")
    usual_guidance = 7.5

    def encode(self, prompts: Sequence[str]) -> Mapping[str, Tensor]:
        embeds, _ = self.pipeline.encode_prompt(list(prompts), self.device, 1, do_classifier_free_guidance=False)
        return {"embeds": embeds}

    def extra(self, tensors: Mapping[str, Tensor], sides: Sequence[int]) -> dict[str, Any]:
        return {}
