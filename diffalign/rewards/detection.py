"""Objects in images, by an instance segmentation network of transformers."""

import importlib
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.placement import placed
from diffalign.vocabulary import NAMES

from .geneval_rules import Detected
from .pixels import normalized, resized
from .weights import pretrained

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet, by channel."""

STRIDE = 32
"""Image sides are padded to a multiple of this number."""


@attrs.frozen(eq=False)
class Detector:
    """Instance segmentation by Mask2Former.

        score of (query, class) = softmax(class logits) * mean of sigmoid(mask logits) inside the mask,    mask = (mask logits > 0)

    Args:
        model: a Mask2FormerForUniversalSegmentation, in eval mode
        side: length to which the shorter side of an image is resized, unless the longer side would exceed 5/3 of it
        device: device of the model; None follows the images

    Reference: Cheng et al., Mask2Former, arXiv:2112.01527.
    """

    model: Any
    side: int = attrs.field(default=800, validator=attrs.validators.ge(STRIDE))
    device: str | None = None

    @classmethod
    def load(cls, source: str, where: str, side: int, device: str | None) -> "Detector":
        """Load the model from a local folder or a hub id; messages name `where`, a Class.field."""
        try:
            importlib.import_module("scipy")  # building Mask2Former needs it, although only training uses it
        except ImportError as error:
            raise ImportError(f"{where.partition('.')[0]} needs the package scipy: pip install 'diffalign[geneval]'") from error
        from transformers import Mask2FormerForUniversalSegmentation

        model = pretrained(Mask2FormerForUniversalSegmentation.from_pretrained, source, where, dtype=torch.float32)
        return cls(model.eval().requires_grad_(False), side, device)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the classes. 80 classes are taken as those of COCO in their order; otherwise the checkpoint's labels are used."""
        labels = self.model.config.id2label
        return NAMES if len(labels) == len(NAMES) else tuple(labels[place] for place in range(len(labels)))

    def detect(self, images: Tensor, least: float) -> list[dict[str, list[Detected]]]:
        """Detect objects with a score above `least`, by class, surest first.

        Args:
            images: [K, 3, H, W] in [0, 1]
            least: score from 0 to 1
        """
        device = images.device if self.device is None else placed(self.device)
        height, width = images.shape[-2:]
        factor = min(self.side / min(height, width), 5 / 3 * self.side / max(height, width))
        inner = round(height * factor), round(width * factor)
        pixels = normalized(resized(images.to(device, torch.float32), *inner, mode="bilinear"), MEAN, STD)
        pixels = F.pad(pixels, (0, -inner[1] % STRIDE, 0, -inner[0] % STRIDE))
        output = self.model.to(device)(pixel_values=pixels)
        both = zip(output.class_queries_logits, output.masks_queries_logits, strict=True)
        return [self._objects(classes, masks, pixels.shape[-2:], inner, (height, width), least) for classes, masks in both]

    def _objects(
        self, classes: Tensor, masks: Tensor, padded: torch.Size, inner: tuple[int, int], size: tuple[int, int], least: float
    ) -> dict[str, list[Detected]]:
        """Find the objects of one image from its queries' classes [Q, C + 1] and masks [Q, h, w], by class."""
        scores, places = classes.softmax(dim=-1)[:, :-1].flatten().topk(len(classes))
        kept = scores > least  # multiplying by the mask's mean makes no score larger
        scores, places = scores[kept], places[kept]
        query, label = places // (classes.shape[-1] - 1), places % (classes.shape[-1] - 1)
        found: dict[str, list[Detected]] = {}
        for score, logits, name in zip(scores.tolist(), masks[query], (self.names[i] for i in label.tolist()), strict=True):
            whole = F.interpolate(logits[None, None], size=tuple(padded), mode="bilinear", align_corners=False)[..., : inner[0], : inner[1]]
            logit = F.interpolate(whole, size=size, mode="bilinear", align_corners=False)[0, 0]
            mask = logit > 0
            sure = score * float((logit.sigmoid() * mask).sum() / (mask.sum() + 1e-6))
            if sure > least and bool(mask.any()):
                found.setdefault(name, []).append(Detected(sure, _box(mask), mask))
        return {name: sorted(objects, key=lambda thing: -thing.score) for name, objects in found.items()}


def _box(mask: Tensor) -> tuple[float, float, float, float]:
    rows, columns = mask.any(dim=1).nonzero().flatten(), mask.any(dim=0).nonzero().flatten()
    return float(columns[0]), float(rows[0]), float(columns[-1]) + 1, float(rows[-1]) + 1
