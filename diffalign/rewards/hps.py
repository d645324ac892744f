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
from .weights import locate, pretrained, read_tensors

HEADS = 16
"""Of both towers of CLIP-H/14; no shape in the checkpoint tells."""


@attrs.define(eq=False)
class HPSv2(Reward):
    """Preference of people between images of the same prompt, learned by CLIP-H (version 2.1 of the weights).

        reward = cos(image, text)

    Oblong images are padded with black to a square, as the authors do. Scale: about 0.15 to 0.4; images of current models lie near 0.27
    to 0.34. Compare images of one prompt only. Licence: Apache-2.0 (code and weights).

    Args:
        weights: the authors' checkpoint: a file, a folder or a hub id that holds `file`
        file: its name there
        tokenizer: of CLIP-H: a hub id or a local folder
        batch: images that pass at once
        device: where the model runs; None: where the images are

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

        tensors = read_tensors(locate(self.weights, self.file, "HPSv2.weights"), "HPSv2.weights")
        tokenizer = pretrained(AutoTokenizer.from_pretrained, self.tokenizer, "HPSv2.tokenizer")
        self._clip = CLIP(clip_model(tensors, HEADS, "HPSv2.weights"), tokenizer, self.batch, self.device, padded_square)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        check_batch("HPSv2", images, prompts)
        return self._clip.cosine(images, prompts)
