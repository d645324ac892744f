"""CLIP as a scorer: unit features of images and texts, in batches."""

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.placement import placed

from .pixels import cropped_square, normalized
from .weights import pretrained


@attrs.frozen(eq=False)
class CLIP:
    """CLIPModel of transformers with its tokenizer.

    Args:
        model: the CLIPModel, in eval mode
        tokenizer: the CLIPTokenizer
        batch: images or texts per network call
        device: device of the model; None follows the images
        square: function that makes images square: (images, size) -> images
    """

    model: Any
    tokenizer: Any
    batch: int = attrs.field(default=16, validator=attrs.validators.ge(1))
    device: str | None = None
    square: Callable[[Tensor, int], Tensor] = cropped_square

    @classmethod
    def load(cls, source: str, where: str, batch: int, device: str | None) -> "CLIP":
        """Load the model from a local folder or a hub id; messages name `where`, a Class.field."""
        from transformers import AutoTokenizer, CLIPModel

        model = pretrained(CLIPModel.from_pretrained, source, where, dtype=torch.float32)
        return cls(model.eval().requires_grad_(False), pretrained(AutoTokenizer.from_pretrained, source, where), batch, device)

    def images(self, images: Tensor) -> Tensor:
        """Unit features of images: [K, 3, H, W] in [0, 1] -> [K, D]."""
        device = self._placed(images)
        size = self.model.config.vision_config.image_size
        pixels = [normalized(self.square(part.to(device, torch.float32), size)) for part in images.split(self.batch)]
        return F.normalize(torch.cat([_projected(self.model.get_image_features(pixel_values=part)) for part in pixels]), dim=-1)

    def texts(self, texts: Sequence[str], images: Tensor) -> Tensor:
        """Unit features of K texts, on the device of the images: [K, D]. A text that comes more than once is encoded once."""
        device = self._placed(images)
        unique = list(dict.fromkeys(map(str, texts)))
        places = {text: place for place, text in enumerate(unique)}
        parts = [self._encoded(unique[start : start + self.batch], device) for start in range(0, len(unique), self.batch)]
        return F.normalize(torch.cat(parts), dim=-1)[[places[str(text)] for text in texts]]

    def cosine(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Cosine of each image and its text: [K]."""
        return (self.images(images) * self.texts(texts, images)).sum(dim=-1)

    def _encoded(self, texts: Sequence[str], device: torch.device) -> Tensor:
        length = self.model.config.text_config.max_position_embeddings
        # only the end token is read, and attention is causal, so the padding after it has no influence
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt").to(device)
        return _projected(self.model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]))

    def _placed(self, images: Tensor) -> torch.device:
        device = images.device if self.device is None else placed(self.device)
        self.model.to(device)
        return device


def _projected(output: Any) -> Tensor:
    """Projected features; transformers 5 wraps them in an object, earlier versions return the tensor."""
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return features
