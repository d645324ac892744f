"""Adapter of FLUX.2 klein and dev."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .family import Family


class Flux2(Family):
    """FLUX.2: latents [4 C, H/2, W/2], which are normalised 2x2 patches; timestep sigma; layers of a language model as text.

    klein is guided by a second call with the empty text; a step-distilled klein is not guided. dev has a guidance input.
    """

    pipelines = ("Flux2KleinPipeline", "Flux2Pipeline")
    lora_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),
        "attn.to_qkv_mlp_proj",
    )
    usual_guidance = 4.0
    shrink = 2
    multiple = 1

    def encode(self, prompts: Sequence[str]) -> Mapping[str, Tensor]:
        config = self.pipeline.text_encoder.config
        config = getattr(config, "text_config", config)
        # evenly spaced depths, as many as the network was built for: the pipelines' 9, 18, 27 of 36 layers and 10, 20, 30 of 40
        count = self.config.joint_attention_dim // config.hidden_size
        layers = tuple(config.num_hidden_layers * (place + 1) // (count + 1) for place in range(count))
        embeds, _ = self.pipeline.encode_prompt(
            list(prompts), max_sequence_length=self.max_sequence_length, text_encoder_out_layers=layers, device=self.device
        )
        return {"embeds": embeds}

    def velocity(self, network: nn.Module, latents: Tensor, sigma: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        batch, _, height, width = latents.shape
        embeds = tensors["embeds"].to(self.dtype)
        zero = torch.zeros(1, dtype=torch.long, device=latents.device)
        rows, columns, words = (torch.arange(count, device=latents.device) for count in (height, width, embeds.shape[1]))
        tokens = network(
            hidden_states=latents.to(self.dtype).flatten(2).transpose(1, 2),
            timestep=sigma,
            guidance=None if self.guidance is None else torch.full_like(sigma, self.guidance),
            encoder_hidden_states=embeds,
            txt_ids=torch.cartesian_prod(zero, zero, zero, words).expand(batch, -1, -1),
            img_ids=torch.cartesian_prod(zero, rows, columns, zero).expand(batch, -1, -1),
            return_dict=False,
        )[0]
        result: Tensor = tokens.transpose(1, 2).reshape(latents.shape)
        return result

    def guide(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        if self.pipeline.config.get("is_distilled", False) or self.guidance is not None:
            raise ValueError("this FLUX.2 is distilled, so it cannot be guided by a second text: take the policy without Guided")
        return negative + scale * (positive - negative)

    def shift(self, steps: int) -> float:
        """Log-shift mu: linear in the tokens at 10 and at 200 steps, linear in the steps between; above 4,300 tokens as at 200 steps."""
        many = 0.00016927 * self.tokens + 0.45666666
        few = 8.73809524e-05 * self.tokens + 1.89833333
        return many if self.tokens > 4300 else many + (few - many) * (200 - steps) / 190

    def unscale(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        variance = vae.bn.running_var.view(1, -1, 1, 1).to(latents) + vae.config.batch_norm_eps
        patches = latents * variance.sqrt() + vae.bn.running_mean.view(1, -1, 1, 1).to(latents)
        batch, channels, height, width = patches.shape
        patches = patches.reshape(batch, channels // 4, 2, 2, height, width).permute(0, 1, 4, 2, 5, 3)
        result: Tensor = patches.reshape(batch, channels // 4, 2 * height, 2 * width)
        return result
