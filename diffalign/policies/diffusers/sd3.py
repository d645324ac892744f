"""Stable Diffusion 3 and 3.5 (arXiv:2403.03206)."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .family import Family

DIFFUSERS_LENGTH = 256
"""`max_sequence_length` of a plain pipeline call; without a T5 encoder as many zero tokens are appended."""


class StableDiffusion3(Family):
    """Latents [C, H, W] as they are, timestep 1000 sigma, CLIP and T5 tokens joined, pooled CLIP beside them."""

    pipelines = ("StableDiffusion3Pipeline",)
    lora_targets = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
    optional = ("text_encoder_3", "tokenizer_3")

    def __init__(self, pipeline: Any, max_sequence_length: int | None) -> None:
        config = pipeline.transformer.config
        self._pipeline = type(pipeline)(**{**pipeline.components, "transformer": None})
        self._length = DIFFUSERS_LENGTH if max_sequence_length is None else max_sequence_length
        self.latent_shape = (config.in_channels, config.sample_size, config.sample_size)

    def encode(self, prompts: Sequence[str]) -> Mapping[str, Tensor]:
        texts = list(prompts)
        embeds, _, pooled, _ = self._pipeline.encode_prompt(
            texts, texts, texts, do_classifier_free_guidance=False, max_sequence_length=self._length, device=self._pipeline.vae.device
        )
        return {"embeds": embeds.detach(), "pooled": pooled.detach()}

    def decode(self, latents: Tensor) -> Tensor:
        vae = self._pipeline.vae
        images = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
        result: Tensor = (images.float() / 2 + 0.5).clamp(0, 1)
        return result

    def sigmas(self, steps: int) -> Tensor:
        scheduler = type(self._pipeline.scheduler).from_config(self._pipeline.scheduler.config)
        scheduler.set_timesteps(steps)
        result: Tensor = scheduler.sigmas.float()
        return result

    def velocity(self, network: nn.Module, latents: Tensor, sigma: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        dtype = tensors["embeds"].dtype
        result: Tensor = network(
            hidden_states=latents.to(dtype),
            timestep=1000 * sigma,
            encoder_hidden_states=tensors["embeds"],
            pooled_projections=tensors["pooled"],
            return_dict=False,
        )[0]
        return result

    def save_lora(self, network: Any, folder: str) -> None:
        from peft import get_peft_model_state_dict

        weights = get_peft_model_state_dict(network, adapter_name="default")
        metadata = network.peft_config["default"].to_dict()
        type(self._pipeline).save_lora_weights(
            folder, transformer_lora_layers=weights, transformer_lora_adapter_metadata=metadata, safe_serialization=True
        )
