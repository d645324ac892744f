"""Adapter of FLUX.1 dev and schnell."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .family import Family
from .packing import pack, unpack


class Flux(Family):
    """FLUX.1: latents [C, H, W] packed into 2x2 patches, timestep sigma, T5 tokens, pooled CLIP, position ids; dev has a guidance input."""

    pipelines = ("FluxPipeline",)
    lora_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )
    channels_per_latent = 4

    def encode(self, prompts: Sequence[str]) -> Mapping[str, Tensor]:
        texts = list(prompts)
        embeds, pooled, _ = self.pipeline.encode_prompt(texts, texts, max_sequence_length=self.max_sequence_length, device=self.device)
        return {"embeds": embeds, "pooled": pooled}

    def velocity(self, network: nn.Module, latents: Tensor, sigma: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        height, width = latents.shape[-2:]
        embeds = tensors["embeds"].to(self.dtype)
        rows, columns = torch.arange(height // 2, device=latents.device), torch.arange(width // 2, device=latents.device)
        places = torch.cartesian_prod(rows.new_zeros(1), rows, columns).to(self.dtype)
        tokens = network(
            hidden_states=pack(latents.to(self.dtype)),
            timestep=sigma,
            guidance=None if self.guidance is None else torch.full_like(sigma, self.guidance),
            pooled_projections=tensors["pooled"].to(self.dtype),
            encoder_hidden_states=embeds,
            txt_ids=embeds.new_zeros(embeds.shape[1], 3),
            img_ids=places,
            return_dict=False,
        )[0]
        return unpack(tokens, height, width)
