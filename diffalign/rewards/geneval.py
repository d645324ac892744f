"""GenEval reward: checks the objects, their numbers, their colours and their positions against the prompt."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import attrs
import torch
from torch import Tensor

from diffalign.core import Prompt, Reward
from diffalign.core.words import allowed_word
from diffalign.placement import is_there
from diffalign.vocabulary import COLORS

from .clip import CLIP
from .detection import Detector
from .geneval_rules import Detected, Wanted, correct, graded, wanted
from .pixels import check_batch, cropped_square, require_finite
from .weights import every

GRAY = 0.6
"""Gray value around an object that is cut out to find its colour: #999."""

TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
CREDIT: Mapping[str, Callable[..., float]] = {"graded": graded, "correct": correct}
_SHARE = attrs.validators.and_(attrs.validators.ge(0.0), attrs.validators.le(1.0))


@attrs.define(eq=False)
class GenEval(Reward):
    """GenEval benchmark as a reward: single object, two objects, counting, colours, position, colour attribution.

    An instance segmentation network finds objects. CLIP names the colour of each object, cut out on gray. The rules are those of the
    benchmark (`geneval_rules`). `prompt.metadata` has the form of the benchmark's files: tag, include, exclude.

        graded    how nearly, which papers train with: the mean over objects of 1 - |n - m| / n (n wanted, m found), and over their colours
                  and positions (`geneval_rules.graded`)
        correct   1 if all holds, else 0, which is the benchmark's own score and what papers report

    The benchmark itself uses the same detector (Mask2Former, Swin-S, COCO instances) from another library.
    Scale: up to 1; "graded" is below 0 if there are far too many objects, "correct" is 0 or 1.
    Licence: MIT (benchmark, Mask2Former's code, CLIP).

    Args:
        detector: a Mask2FormerForUniversalSegmentation for instances: hub id, or local folder written by save_pretrained
        clip: the CLIP that names colours: hub id or local folder
        threshold: score above which an object counts
        counting_threshold: the same for prompts with the tag "counting"
        max_objects: largest number of objects of a class; the surest are taken
        slack: distance that boxes must have for a position, as a share of their sizes
        credit: "graded" or "correct", as above
        side: shorter side of an image for the detector, in pixels
        batch: images per network call
        device: device of the models; None follows the images

    Raises:
        ConfigError: the weights cannot be found; (in a call or in `require`) a prompt has no such metadata.

    Reference: Ghosh et al., arXiv:2310.11513; graded as in Liu et al., Flow-GRPO, arXiv:2505.05470.
    """

    detector: str = "facebook/mask2former-swin-small-coco-instance"
    clip: str = "openai/clip-vit-large-patch14"
    threshold: float = attrs.field(default=0.3, validator=_SHARE)
    counting_threshold: float = attrs.field(default=0.9, validator=_SHARE)
    max_objects: int = attrs.field(default=16, validator=attrs.validators.ge(1))
    slack: float = attrs.field(default=0.1, validator=attrs.validators.ge(0.0))
    credit: Literal["graded", "correct"] = attrs.field(default="graded", validator=allowed_word)
    side: int = 800
    batch: int = attrs.field(default=4, validator=attrs.validators.ge(1))
    device: str | None = attrs.field(default=None, validator=is_there)
    _detector: Detector = attrs.field(init=False, repr=False)
    _clip: CLIP = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._detector, self._clip = every(
            lambda: Detector.load(self.detector, "GenEval.detector", self.side, self.device),
            lambda: CLIP.load(self.clip, "GenEval.clip", batch=16, device=self.device),
        )

    def require(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts whose metadata does not say what an image should show, before anything is drawn.

        Raises:
            ConfigError: the metadata of a prompt is missing or wrong; the message names the first such prompt.
        """
        for prompt in prompts:
            wanted(prompt, self._detector.names)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        check_batch("GenEval", images, prompts)
        require_finite("GenEval", images, prompts)
        wants = [wanted(prompt, self._detector.names) for prompt in prompts]
        least = min(self.threshold, self.counting_threshold)
        scores: list[float] = []
        for start in range(0, len(images), self.batch):
            part = images[start : start + self.batch]
            for image, found, want in zip(part, self._detector.detect(part, least), wants[start:], strict=False):
                scores.append(self._score(image, found, want))
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def _score(self, image: Tensor, found: dict[str, list[Detected]], want: Wanted) -> float:
        least = self.counting_threshold if want.counting else self.threshold
        sure = {name: [thing for thing in objects if thing.score > least][: self.max_objects] for name, objects in found.items()}
        return float(CREDIT[self.credit](want, sure, lambda name, objects: self._colors(image, name, objects), self.slack))

    def _colors(self, image: Tensor, name: str, objects: Sequence[Detected]) -> list[str]:
        """Colour of each object, which CLIP chooses among ten."""
        size = self._clip.model.config.vision_config.image_size
        cut = torch.cat([cropped_square(_cut_out(image, thing), size) for thing in objects])
        texts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
        # text features of a colour: the mean of its templates' unit features, whose length does not change which object is closest
        classes = torch.nn.functional.normalize(self._clip.texts(texts, image).unflatten(0, (len(COLORS), -1)).mean(dim=1), dim=-1)
        return [COLORS[place] for place in (self._clip.images(cut) @ classes.T).argmax(dim=1).tolist()]


def _cut_out(image: Tensor, thing: Detected) -> Tensor:
    """Cut out the object's box, gray around the object: [3, H, W] -> [1, 3, h, w]."""
    left, top, right, bottom = map(round, thing.box)
    mask = thing.mask.to(image.device)
    return torch.where(mask, image, image.new_tensor(GRAY))[None, :, top:bottom, left:right]
