"""GenEval: are the objects there, as many, as coloured and where the prompt says?"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import attrs
import torch
from torch import Tensor

from diffalign.core import Prompt, Reward
from diffalign.placement import is_there
from diffalign.vocabulary import COLORS

from .clip import CLIP
from .detection import Detector
from .geneval_rules import Found, Wanted, correct, graded, wanted
from .pixels import check_batch, cropped_square

GRAY = 0.6
"""What stands around an object whose colour is asked for: #999."""

TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
CREDIT: Mapping[str, Callable[..., float]] = {"graded": graded, "correct": correct}
_SHARE = attrs.validators.and_(attrs.validators.ge(0.0), attrs.validators.le(1.0))


@attrs.define(eq=False)
class GenEval(Reward):
    """The GenEval benchmark as a reward: single object, two objects, counting, colours, position, colour attribution.

    An instance segmentation network finds objects; CLIP names the colour of each, cut out on gray; the rules are the benchmark's
    (`geneval_rules`). `prompt.metadata` has the form of its files: tag, include, exclude.

        graded    how nearly, which papers train with: the mean over objects of 1 - |n - m| / n (n wanted, m found), and over their colours
                  and positions (`geneval_rules.graded`)
        correct   1 if all holds, else 0, which is the benchmark's own score and what papers report

    The benchmark's own detector is the same network (Mask2Former, Swin-S, COCO instances) in another library.
    Scale: up to 1; graded is below 0 where there are far too many objects, correct is 0 or 1.
    Licence: MIT (benchmark, Mask2Former's code, CLIP).

    Args:
        detector: a Mask2FormerForUniversalSegmentation for instances: a hub id, or a local folder that save_pretrained wrote
        clip: the CLIP that names colours, likewise
        threshold: score above which an object counts
        counting_threshold: the same for prompts of the tag "counting"
        max_objects: of a class, the surest
        slack: how far boxes must lie apart for a position, as a share of their sizes
        credit: which of the two
        side: shorter side of an image for the detector, in pixels
        batch: images that pass at once
        device: where the models run; None: where the images are

    Raises:
        ConfigError: weights cannot be found; (of a call, or of `require`) a prompt without its metadata.

    Reference: Ghosh et al., arXiv:2310.11513; graded as in Liu et al., Flow-GRPO, arXiv:2505.05470.
    """

    detector: str = "facebook/mask2former-swin-small-coco-instance"
    clip: str = "openai/clip-vit-large-patch14"
    threshold: float = attrs.field(default=0.3, validator=_SHARE)
    counting_threshold: float = attrs.field(default=0.9, validator=_SHARE)
    max_objects: int = attrs.field(default=16, validator=attrs.validators.ge(1))
    slack: float = attrs.field(default=0.1, validator=attrs.validators.ge(0.0))
    credit: Literal["graded", "correct"] = attrs.field(default="graded", validator=attrs.validators.in_(("graded", "correct")))
    side: int = 800
    batch: int = attrs.field(default=4, validator=attrs.validators.ge(1))
    device: str | None = attrs.field(default=None, validator=is_there)
    _detector: Detector = attrs.field(init=False, repr=False)
    _clip: CLIP = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._detector = Detector.load(self.detector, "GenEval.detector", self.side, self.device)
        self._clip = CLIP.load(self.clip, "GenEval.clip", batch=16, device=self.device)

    def require(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts whose metadata does not say what an image should show, before anything is drawn.

        Raises:
            ConfigError: the first of them, by name.
        """
        for prompt in prompts:
            wanted(prompt, self._detector.names)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        check_batch("GenEval", images, prompts)
        wants = [wanted(prompt, self._detector.names) for prompt in prompts]
        least = min(self.threshold, self.counting_threshold)
        scores: list[float] = []
        for start in range(0, len(images), self.batch):
            part = images[start : start + self.batch]
            for image, found, want in zip(part, self._detector.detect(part, least), wants[start:], strict=False):
                scores.append(self._score(image, found, want))
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def _score(self, image: Tensor, found: dict[str, list[Found]], want: Wanted) -> float:
        least = self.counting_threshold if want.counting else self.threshold
        sure = {name: [thing for thing in objects if thing.score > least][: self.max_objects] for name, objects in found.items()}
        return float(CREDIT[self.credit](want, sure, lambda name, objects: self._colors(image, name, objects), self.slack))

    def _colors(self, image: Tensor, name: str, objects: Sequence[Found]) -> list[str]:
        """The colour of each object, which CLIP chooses among ten."""
        size = self._clip.model.config.vision_config.image_size
        cut = torch.cat([cropped_square(_cut_out(image, thing), size) for thing in objects])
        texts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
        # a colour's text features: the mean of its templates' unit features; its length plays no part in which is the closest
        classes = torch.nn.functional.normalize(self._clip.texts(texts, image).unflatten(0, (len(COLORS), -1)).mean(dim=1), dim=-1)
        return [COLORS[place] for place in (self._clip.images(cut) @ classes.T).argmax(dim=1).tolist()]


def _cut_out(image: Tensor, thing: Found) -> Tensor:
    """[3, H, W] -> [1, 3, h, w]: the object's box, gray beside the object."""
    left, top, right, bottom = map(round, thing.box)
    mask = thing.mask.to(image.device)
    return torch.where(mask, image, image.new_tensor(GRAY))[None, :, top:bottom, left:right]
