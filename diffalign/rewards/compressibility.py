"""File size as a reward."""

import io
from collections.abc import Sequence

import attrs
import torch
from PIL import Image
from torch import Tensor

from diffalign.core import Prompt, Reward

from .pixels import eight_bit


@attrs.frozen
class JPEGCompressibility(Reward):
    """Negative size of the image as a JPEG file, in kilobytes. It needs no model, and has no gradient.

    Args:
        quality: JPEG quality

    Reference: Black et al., DDPO, arXiv:2305.13301.
    """

    quality: int = attrs.field(default=95, validator=[attrs.validators.ge(1), attrs.validators.le(100)])

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        pixels = eight_bit("JPEGCompressibility", images, prompts).permute(0, 2, 3, 1).cpu().numpy()
        return torch.tensor([-self._kilobytes(Image.fromarray(picture)) for picture in pixels])

    def _kilobytes(self, image: Image.Image) -> float:
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=self.quality)
        return buffer.tell() / 1000
