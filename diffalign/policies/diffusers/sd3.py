"""Adapter of Stable Diffusion 3 and 3.5 (arXiv:2403.03206)."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from .family import Family


class StableDiffusion3(Family):
    """Stable Diffusion 3: latents [C, H, W] unpacked, timestep 1000 sigma, CLIP and T5 tokens joined, and pooled CLIP.

    Without a T5 encoder, zero tokens replace its tokens.
    """

    pipelines = ("StableDiffusion3Pipeline",)
    lora_targets = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
    optional = ("text_encoder_3", "tokenizer_3")
    length = 256
    uniform = False

    def _latent_shape(self) -> tuple[int, ...]:
        shape = super()._latent_shape()
        positions = self.config.pos_embed_max_size * self.config.patch_size
        if max(shape[1:]) > positions:
            height, width = (side * self.pipeline.vae_scale_factor for side in shape[1:])
            raise ValueError(
                f"resolution must have sides of at most {positions * self.pipeline.vae_scale_factor} for this model, which knows "
                f"no more positions; got {height} x {width} (height x width)"
            )
        return shape

    def encode(self, prompts: Sequence[str]) -> Mapping[str, Tensor]:
        texts = list(prompts)
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            texts, texts, texts, do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length, device=self.device
        )
        return {"embeds": embeds, "pooled": pooled}

    def velocity(self, network: nn.Module, latents: Tensor, sigma: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        result: Tensor = network(
            hidden_states=latents.to(self.dtype),
            timestep=1000 * sigma,
            encoder_hidden_states=tensors["embeds"].to(self.dtype),
            pooled_projections=tensors["pooled"].to(self.dtype),
            return_dict=False,
        )[0]
        return result
