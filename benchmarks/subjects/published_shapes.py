"""Every model family at the shape of a published model, without weights: what `cost roofline` counts on.

Networks are made on torch's meta device. Shapes are those of the models' config.json, which diffusers' defaults repeat for most; texts are
as long as the pipelines make them at most.
"""

from collections.abc import Callable, Mapping
from types import SimpleNamespace

import attrs
import torch
from diffusers import (
    DDIMScheduler,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from torch import nn

from benchmarks.subjects.random_families import SD35_MEDIUM
from diffalign import Prompt
from diffalign.core import CPS, Condition
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


@attrs.frozen
class Published:
    """Network of a published model, without weights.

    Args:
        network: makes the network
        family: its model family
        texts: shapes of the tensors of one encoded text, by name
        pixels: side of the images in pixels
        rank: rank of the adapters
        factor: pixels of an autoencoder's latent
    """

    network: Callable[[], nn.Module]
    family: type[Family]
    texts: Mapping[str, tuple[int, ...]]
    pixels: int = 1024
    rank: int = 32
    factor: int = 8

    def policy(self, dtype: torch.dtype, lora: bool = True) -> FlowMatchingPolicy:
        """Make a policy on the meta device, with adapters on the family's usual layers. Without adapters nothing is trained."""
        with default_dtype(dtype), torch.device("meta"):
            network = self.network().eval()
        pipeline = SimpleNamespace(vae_scale_factor=self.factor, scheduler=DDIMScheduler(), config={})
        setattr(pipeline, self.family.component, network)
        family = self.family(pipeline, Setting(resolution=(self.pixels, self.pixels)))
        if lora:
            LoRA(rank=self.rank).attach(network, family.lora_targets, family)
        return FlowMatchingPolicy(network.requires_grad_(False) if not lora else network, family, CPS())

    def condition(self, dtype: torch.dtype) -> Condition:
        """Make the condition of one text of the greatest length."""
        tensors = {name: torch.zeros(1, *shape, dtype=dtype, device="meta") for name, shape in self.texts.items()}
        if "lengths" in tensors:
            tensors["lengths"] = torch.tensor([self.texts["embeds"][0]])
        return Condition((Prompt("a text"),), torch.arange(1), tensors)


SDXL = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
KLEIN_4B = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680, "guidance_embeds": False}

MODELS: Mapping[str, Published] = {
    "SD3.5-M 512": Published(SD35_MEDIUM.network, StableDiffusion3, {"embeds": (333, 4096), "pooled": (2048,)}, pixels=512),
    "FLUX.1-dev 512": Published(
        lambda: FluxTransformer2DModel(guidance_embeds=True), Flux, {"embeds": (512, 4096), "pooled": (768,)}, pixels=512, rank=64
    ),
    "FLUX.2-klein-4B": Published(lambda: Flux2Transformer2DModel(**KLEIN_4B), Flux2, {"embeds": (512, 7680)}),
    "FLUX.2-dev": Published(Flux2Transformer2DModel, Flux2, {"embeds": (512, 15360)}),
    "Z-Image": Published(ZImageTransformer2DModel, ZImage, {"embeds": (512, 2560), "lengths": ()}),
    "Qwen-Image": Published(QwenImageTransformer2DModel, QwenImage, {"embeds": (512, 3584), "lengths": ()}),
    "Sana-1.6B": Published(SanaTransformer2DModel, Sana, {"embeds": (300, 2304), "mask": (300,)}, factor=32),
    "SD1.5 512": Published(
        lambda: UNet2DConditionModel(sample_size=64, cross_attention_dim=768), StableDiffusion, {"embeds": (77, 768)}, pixels=512
    ),
    "SDXL": Published(lambda: UNet2DConditionModel(**SDXL), StableDiffusionXL, {"embeds": (77, 2048), "pooled": (1280,)}),
}
