"""Human Preference Score v2."""

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from diffalign.core import Prompt, Reward
from diffalign.placement import is_there

from .clip import CLIP
from .open_clip import clip_model
from .pixels import check_batch, padded_square
from .weights import every, locate, pretrained, read_tensors

HEADS = 16
"""Attention heads of both towers of CLIP-H/14, which no shape in the checkpoint shows."""


@attrs.define(eq=False)
class HPSv2(Reward):
    """Preference of people between images of the same prompt, learned by CLIP-H (version 2.1 of the weights).

        reward = cos(image, text)

    Images that are not square are padded with black, as the authors do. Scale: about 0.15 to 0.4; images of current models lie near 0.27
    to 0.34. Compare only images of the same prompt. Licence: Apache-2.0 (code and weights).

    Args:
        weights: the authors' checkpoint: a file, or a folder or hub id that holds `file`
        file: file name of the checkpoint there
        tokenizer: tokenizer of CLIP-H: hub id or local folder
        batch: images per network call
        device: device of the model; None follows the images

    Raises:
        ConfigError: the weights cannot be found, or are those of another network.

    Reference: Wu et al., arXiv:2306.09341.
    """

    weights: str = "xswu/HPSv2"
    file: str = "HPS_v2.1_compressed.pt"
    tokenizer: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    batch: int = attrs.field(default=16, validator=attrs.validators.ge(1))
    device: str | None = attrs.field(default=None, validator=is_there)
    _clip: CLIP = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        from transformers import AutoTokenizer

        file, tokenizer = every(
            lambda: locate(self.weights, self.file, "HPSv2.weights"),
            lambda: pretrained(AutoTokenizer.from_pretrained, self.tokenizer, "HPSv2.tokenizer"),
        )
        tensors = read_tensors(file, "HPSv2.weights")
        self._clip = CLIP(clip_model(tensors, HEADS, "HPSv2.weights"), tokenizer, self.batch, self.device, padded_square)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        check_batch("HPSv2", images, prompts)
        return self._clip.cosine(images, prompts)
