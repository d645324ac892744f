"""Every model family at the shape of a published model, without weights: what `cost roofline` counts on.

Networks are made on torch's meta device from the numbers of `diffalign.costs.shapes`.
"""

from collections.abc import Mapping
from types import SimpleNamespace

import attrs
import diffusers
import torch
from diffusers import DDIMScheduler

from diffalign import Prompt
from diffalign.core import CPS, Condition
from diffalign.costs.shapes import PUBLISHED, PublishedShape
from diffalign.policies import FlowMatchingPolicy, LoRA
from diffalign.policies.diffusers import Family, Setting
from diffalign.policies.diffusers.flux import Flux
from diffalign.policies.diffusers.flux2 import Flux2
from diffalign.policies.diffusers.mapped import default_dtype
from diffalign.policies.diffusers.qwen_image import QwenImage
from diffalign.policies.diffusers.sana import Sana
from diffalign.policies.diffusers.sd3 import StableDiffusion3
from diffalign.policies.diffusers.stable_diffusion import StableDiffusion
from diffalign.policies.diffusers.stable_diffusion_xl import StableDiffusionXL
from diffalign.policies.diffusers.z_image import ZImage

FAMILIES = (Flux, Flux2, QwenImage, Sana, StableDiffusion, StableDiffusion3, StableDiffusionXL, ZImage)


@attrs.frozen
class Published:
    """Network of a published model, without weights.

    Args:
        shape: its numbers
        pixels: side of the images in pixels
        rank: rank of the adapters
    """

    shape: PublishedShape
    pixels: int = 1024
    rank: int = 32

    @property
    def family(self) -> type[Family]:
        """Its model family."""
        return next(family for family in FAMILIES if self.shape.pipeline in family.pipelines)

    def policy(self, dtype: torch.dtype, lora: bool = True) -> FlowMatchingPolicy:
        """Make a policy on the meta device, with adapters on the family's usual layers. Without adapters nothing is trained."""
        family_class = self.family
        with default_dtype(dtype), torch.device("meta"):
            network = getattr(diffusers, self.shape.network)(**self.shape.config).eval()
        factor = self.shape.factor // family_class.shrink
        pipeline = SimpleNamespace(vae_scale_factor=factor, scheduler=DDIMScheduler(), config={})
        setattr(pipeline, family_class.component, network)
        family = family_class(pipeline, Setting(resolution=(self.pixels, self.pixels)))
        if lora:
            LoRA(rank=self.rank).attach(network, family.lora_targets, family)
        return FlowMatchingPolicy(network.requires_grad_(False) if not lora else network, family, CPS())

    def condition(self, dtype: torch.dtype) -> Condition:
        """Make the condition of one text of the greatest length."""
        tensors = {name: torch.zeros(1, *shape, dtype=dtype, device="meta") for name, shape in self.shape.texts.items()}
        if "lengths" in tensors:
            tensors["lengths"] = torch.tensor([self.shape.texts["embeds"][0]])
        return Condition((Prompt("a text"),), torch.arange(1), tensors)


MODELS: Mapping[str, Published] = {
    "SD3.5-M 512": Published(PUBLISHED["SD3.5-M"], pixels=512),
    "FLUX.1-dev 512": Published(PUBLISHED["FLUX.1-dev"], pixels=512, rank=64),
    "FLUX.2-klein-4B": Published(PUBLISHED["FLUX.2-klein-4B"]),
    "FLUX.2-dev": Published(PUBLISHED["FLUX.2-dev"]),
    "Z-Image": Published(PUBLISHED["Z-Image"]),
    "Qwen-Image": Published(PUBLISHED["Qwen-Image"]),
    "Sana-1.6B": Published(PUBLISHED["Sana-1.6B"]),
    "SD1.5 512": Published(PUBLISHED["SD1.5"], pixels=512),
    "SDXL": Published(PUBLISHED["SDXL"]),
}
