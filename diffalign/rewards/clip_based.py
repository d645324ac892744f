"""Rewards that are CLIP with at most a small head."""

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor, nn

from diffalign.core import ConfigError, Prompt, Reward
from diffalign.placement import is_there

from .clip import CLIP
from .heads import linear_layers
from .pixels import check_batch
from .weights import every

_AT_LEAST_ONE = attrs.validators.ge(1)


@attrs.define(eq=False)
class PickScore(Reward):
    """Preference of people who chose one of two images, learned by CLIP-H.

        reward = exp(logit_scale) * cos(image, text)

    Scale: about 17 to 26; images of current models lie near 21 to 24. Some projects divide it by 26.
    Licence: MIT.

    Args:
        model: hub id, or local folder written by save_pretrained, with the tokenizer
        batch: images per network call
        device: device of the model; None follows the images

    Raises:
        ConfigError: the weights cannot be found.

    Reference: Kirstain et al., Pick-a-Pic, arXiv:2305.01569.
    """

    model: str = "yuvalkirstain/PickScore_v1"
    batch: int = attrs.field(default=16, validator=_AT_LEAST_ONE)
    device: str | None = attrs.field(default=None, validator=is_there)
    _clip: CLIP = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._clip = CLIP.load(self.model, "PickScore.model", self.batch, self.device)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        check_batch("PickScore", images, prompts)
        cosine = self._clip.cosine(images, prompts)
        scale: Tensor = self._clip.model.logit_scale.exp()  # read after the model has moved to the images' device
        return scale * cosine


@attrs.define(eq=False)
class CLIPScore(Reward):
    """Similarity of an image and its text, by CLIP.

        reward = scale * max(cos(image, prefix + text), 0)

    Scale: 0 to 2.5, in practice 0.5 to 0.9. The paper takes CLIP-B/32 and puts "A photo depicts " before captions. With scale 100 it is the
    number that many libraries report. Licence: MIT.

    Args:
        model: hub id, or local folder written by save_pretrained
        scale: factor of the cosine
        prefix: text that is put before every prompt
        batch: images per network call
        device: device of the model; None follows the images

    Raises:
        ConfigError: the weights cannot be found.

    Reference: Hessel et al., arXiv:2104.08718.
    """

    model: str = "openai/clip-vit-base-patch32"
    scale: float = attrs.field(default=2.5, validator=attrs.validators.gt(0.0))
    prefix: str = ""
    batch: int = attrs.field(default=16, validator=_AT_LEAST_ONE)
    device: str | None = attrs.field(default=None, validator=is_there)
    _clip: CLIP = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._clip = CLIP.load(self.model, "CLIPScore.model", self.batch, self.device)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        check_batch("CLIPScore", images, prompts)
        return self.scale * self._clip.cosine(images, [self.prefix + prompt for prompt in prompts]).clamp(min=0)


@attrs.define(eq=False)
class Aesthetic(Reward):
    """LAION's aesthetic predictor: a linear head on CLIP-L, which does not read the prompt.

        reward = W_5 (W_4 (W_3 (W_2 (W_1 f + b_1) + b_2) + b_3) + b_4) + b_5,    f = unit image features of CLIP-L/14

    The head has five linear layers without activations between them, as published, so it is one linear map.
    Scale: ratings by people from 1 to 10; images of current models lie near 5 to 6.5. Licence: Apache-2.0 (head), MIT (CLIP).

    Args:
        model: CLIP-L/14: hub id, or local folder written by save_pretrained
        head: the five layers: a file, or a folder or hub id that holds `file`
        file: file name of the head in that folder or on the hub
        batch: images per network call
        device: device of the model; None follows the images

    Raises:
        ConfigError: the weights cannot be found, or CLIP and head do not fit each other.

    Reference: Schuhmann et al., LAION-5B, arXiv:2210.08402 (github.com/christophschuhmann/improved-aesthetic-predictor).
    """

    model: str = "openai/clip-vit-large-patch14"
    head: str = "trl-lib/ddpo-aesthetic-predictor"
    file: str = "aesthetic-model.pth"
    batch: int = attrs.field(default=16, validator=_AT_LEAST_ONE)
    device: str | None = attrs.field(default=None, validator=is_there)
    _clip: CLIP = attrs.field(init=False, repr=False)
    _layers: nn.Sequential = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._layers, self._clip = every(
            lambda: linear_layers(self.head, self.file, "Aesthetic.head"),
            lambda: CLIP.load(self.model, "Aesthetic.model", self.batch, self.device),
        )
        width, wanted = self._clip.model.config.projection_dim, next(self._layers.parameters()).shape[1]
        if width != wanted:
            raise ConfigError(f"Aesthetic.model must give {wanted} features, which Aesthetic.head takes; {self.model!r} gives {width}")

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        check_batch("Aesthetic", images, prompts)
        features = self._clip.images(images)
        scores: Tensor = self._layers.to(features.device)(features)
        return scores.squeeze(1)
