"""Adapter of Sana (arXiv:2410.10629)."""

import inspect
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from .family import Family


class Sana(Family):
    """Sana: latents [C, H, W] of a 32-fold autoencoder, timestep 1000 sigma, masked texts. Prompts, not negatives, follow an instruction.

    Released pipelines have a solver of higher order. Its shift is used, but the steps are Euler steps.
    """

    pipelines = ("SanaPipeline",)
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    length = 300
    comfyui = None
    multiple = 1
    uniform = False

    def encode(self, prompts: Sequence[str]) -> Mapping[str, Tensor]:
        instruction = inspect.signature(type(self.pipeline).__call__).parameters["complex_human_instruction"].default
        return self._encode(prompts, instruction)

    def encode_negative(self, prompt: str) -> Mapping[str, Tensor]:
        return self._encode([prompt], None)

    def _encode(self, prompts: Sequence[str], instruction: list[str] | None) -> Mapping[str, Tensor]:
        embeds, mask, _, _ = self.pipeline.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            complex_human_instruction=instruction,
            device=self.device,
        )
        return {"embeds": embeds, "mask": mask}

    def velocity(self, network: nn.Module, latents: Tensor, sigma: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        output: Tensor = network(
            latents.to(self.dtype),
            encoder_hidden_states=tensors["embeds"].to(self.dtype),
            encoder_attention_mask=tensors["mask"],
            timestep=1000 * sigma * self.config.timestep_scale,
            return_dict=False,
        )[0]
        return output[:, : latents.shape[1]]  # a network that also learned its variance appends it as further channels
