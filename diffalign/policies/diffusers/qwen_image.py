"""Adapter of Qwen-Image."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .family import Family
from .packing import pack, unpack


class QwenImage(Family):
    """Qwen-Image: latents [C, H, W] packed into 2x2 patches, timestep sigma, masked texts.

    The guided velocity is rescaled to the length of the positive velocity, for each packed token.
    """

    pipelines = ("QwenImagePipeline",)
    lora_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )
    ragged = ("embeds",)
    channels_per_latent = 4

    def encode(self, prompts: Sequence[str]) -> Mapping[str, Tensor]:
        embeds, mask = self.pipeline.encode_prompt(list(prompts), max_sequence_length=self.max_sequence_length, device=self.device)
        lengths = torch.full((len(embeds),), embeds.shape[1]) if mask is None else mask.sum(dim=1)
        return {"embeds": embeds, "lengths": lengths}

    def velocity(self, network: nn.Module, latents: Tensor, sigma: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        batch, _, height, width = latents.shape
        lengths = tensors["lengths"]
        longest = int(lengths.max())
        embeds = tensors["embeds"][:, :longest].to(self.dtype)
        mask = torch.arange(longest, device=embeds.device) < lengths[:, None].to(embeds.device)
        tokens = network(
            hidden_states=pack(latents.to(self.dtype)),
            timestep=sigma,
            guidance=None if self.guidance is None else torch.full_like(sigma, self.guidance),
            encoder_hidden_states=embeds,
            # the pipeline also leaves out a full mask
            encoder_hidden_states_mask=None if int(lengths.min()) == longest else mask.long(),
            img_shapes=[[(1, height // 2, width // 2)]] * batch,
            return_dict=False,
        )[0]
        return unpack(tokens, height, width)

    def guide(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        guided, length = pack(negative + scale * (positive - negative)), pack(positive).norm(dim=-1, keepdim=True)
        return unpack(guided * (length / guided.norm(dim=-1, keepdim=True)), *positive.shape[-2:])

    def unscale(self, latents: Tensor) -> Tensor:
        config = self.pipeline.vae.config
        std, mean = (latents.new_tensor(values).view(1, -1, 1, 1) for values in (config.latents_std, config.latents_mean))
        return (latents * std + mean)[:, :, None]
