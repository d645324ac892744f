"""Adapter of Z-Image and Z-Image-Turbo."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .family import Family


class ZImage(Family):
    """Z-Image: lists of latents [C, 1, H, W] and of unpadded texts; time 1 - sigma; the output is x_0 - noise, so it is negated.

    Guidance is p + g (p - n): g = 0 means no guidance, and the usual scale is 1 + g.
    """

    pipelines = ("ZImagePipeline",)
    lora_targets = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")
    ragged = ("embeds",)
    no_guidance = 0.0

    def encode(self, prompts: Sequence[str]) -> Mapping[str, Tensor]:
        # a copy, because the pipeline writes its chat template into the list
        rows, _ = self.pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length, device=self.device
        )
        return {"embeds": pad_sequence(rows, batch_first=True), "lengths": torch.tensor([len(row) for row in rows])}

    def velocity(self, network: nn.Module, latents: Tensor, sigma: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        texts = [row[:length] for row, length in zip(tensors["embeds"].to(self.dtype), tensors["lengths"].tolist(), strict=True)]
        outputs = network(list(latents.to(self.dtype)[:, :, None]), 1 - sigma, texts, return_dict=False)[0]
        return -torch.stack([output.float() for output in outputs]).squeeze(2)

    def guide(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        return positive + scale * (positive - negative)
