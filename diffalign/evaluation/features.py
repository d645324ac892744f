"""Features of images, for measures of diversity."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffalign.core import ConfigError
from diffalign.core.hub import is_within_reach, unreached
from diffalign.placement import is_there, placed

Network = tuple[Callable[[Tensor], Tensor], int, Tensor, Tensor]


class Features(ABC):
    """Turns images into vectors. Similar images get vectors of similar direction."""

    @abstractmethod
    def __call__(self, images: Tensor) -> Tensor:
        """Compute features of images [K, 3, H, W] in [0, 1]: [K, D], finite. No gradient is taken."""


@attrs.frozen
class PixelFeatures(Features):
    """Pixels of the image, scaled down and centred. They need no model, and show only layout and colour.

        features = flatten(resized image - 1/2)

    Args:
        side: side in pixels to which images are scaled; smaller images stay as they are
    """

    side: int = attrs.field(default=16, validator=attrs.validators.ge(1))

    def __call__(self, images: Tensor) -> Tensor:
        if max(images.shape[-2:]) > self.side:
            images = F.interpolate(images.float(), size=(self.side, self.side), mode="bilinear", antialias=True)
        return images.flatten(1) - 0.5


@attrs.frozen
class ShapeWorldFeatures(Features):
    """Positions of the objects in a ShapeWorld image, read from its pixels: deterministic, on the CPU, without a download.

        features[colour, shape, y, x] = sum over objects of that kind of area exp(-|(x, y) - centre|^2 / (2 s^2))

    on a grid over the image. Images of the same objects in other places are far apart, and so are images of other objects in the same
    places. An empty image is equal only to empty images.

    Args:
        grid: number of grid points along each side
        blur: s in pixels; objects that lie nearer than this count as being in the same place

    Raises:
        ValueError: images are not [K, 3, 64, 64] floating point numbers in [0, 1].
    """

    grid: int = attrs.field(default=8, validator=attrs.validators.ge(1))
    blur: float = attrs.field(default=6.0, validator=attrs.validators.gt(0))

    def __call__(self, images: Tensor) -> Tensor:
        from diffalign.shapeworld.grammar import COLORS, SHAPES
        from diffalign.shapeworld.recognition import find_objects

        places = (torch.arange(self.grid) + 0.5) * (images.shape[-1] / self.grid)
        colors, features = list(COLORS), torch.zeros(len(images), len(COLORS), len(SHAPES), self.grid, self.grid)
        for row, found in enumerate(find_objects(images.clamp(0, 1))):
            for thing in found:
                along, down = ((-(places - middle).square() / (2 * self.blur**2)).exp() for middle in (thing.x, thing.y))
                features[row, colors.index(thing.color), SHAPES.index(thing.shape)] += thing.area * down[:, None] * along
        return features.flatten(1)


class Pretrained(Features):
    """Features of a pretrained network, which is loaded with the first images."""

    rows: int

    def __call__(self, images: Tensor) -> Tensor:
        return _extracted(self._network(), images, self.rows)

    def reach(self) -> None:
        """Load the model, which is else loaded with the first images.

        Raises:
            ConfigError: it is not within reach.
        """
        self._network()

    @abstractmethod
    def _network(self) -> Network:
        """Load the network, or take it from the cache."""


@attrs.frozen
class DINOv2Features(Pretrained):
    """Class token of a DINOv2 model, after its last norm.

    Args:
        path: hub id of a model, or a folder
        revision: branch, tag or commit of a model id
        device: device of the model; by default an accelerator if there is one
        rows: images per call

    Reference: Oquab et al., arXiv:2304.07193.
    """

    path: str = "facebook/dinov2-base"
    revision: str | None = None
    device: str | None = attrs.field(default=None, validator=is_there)
    rows: int = attrs.field(default=32, validator=attrs.validators.ge(1))

    def _network(self) -> Network:
        return _dinov2(self.path, self.revision, str(placed(self.device or "auto")))


@attrs.frozen
class CLIPFeatures(Pretrained):
    """Projected image embedding of a CLIP model.

    Args:
        path, revision, device, rows: see `DINOv2Features`

    Reference: Radford et al., arXiv:2103.00020.
    """

    path: str = "openai/clip-vit-large-patch14"
    revision: str | None = None
    device: str | None = attrs.field(default=None, validator=is_there)
    rows: int = attrs.field(default=32, validator=attrs.validators.ge(1))

    def _network(self) -> Network:
        return _clip(self.path, self.revision, str(placed(self.device or "auto")))


@functools.cache
def _dinov2(path: str, revision: str | None, device: str) -> Network:
    from transformers import AutoModel

    model = _loaded(AutoModel, path, revision, device)
    return (lambda pixels: model(pixel_values=pixels).last_hidden_state[:, 0], *_preprocessing(path, revision, device))


@functools.cache
def _clip(path: str, revision: str | None, device: str) -> Network:
    from transformers import CLIPVisionModelWithProjection

    model = _loaded(CLIPVisionModelWithProjection, path, revision, device)
    return (lambda pixels: model(pixel_values=pixels).image_embeds, *_preprocessing(path, revision, device))


def _loaded(kind: Any, path: str, revision: str | None, device: str) -> nn.Module:
    try:
        model: nn.Module = kind.from_pretrained(path, revision=revision, local_files_only=not is_within_reach())
    except (OSError, ValueError) as error:
        raise ConfigError(f"features: the model {path!r} cannot be loaded: {unreached(path, error)}") from error
    return model.to(device).eval().requires_grad_(False)


def _preprocessing(path: str, revision: str | None, device: str) -> tuple[int, Tensor, Tensor]:
    """Side, mean and standard deviation from the model's own preprocessor_config.json: [1, 3, 1, 1] each."""
    from transformers import ImageProcessingMixin

    settings: dict[str, Any] = ImageProcessingMixin.get_image_processor_dict(
        path, revision=revision, local_files_only=not is_within_reach()
    )[0]
    size = settings.get("crop_size") or settings["size"]
    side = size if isinstance(size, int) else size.get("height", size.get("shortest_edge"))
    mean, std = (torch.tensor(settings[name], device=device).view(1, 3, 1, 1) for name in ("image_mean", "image_std"))
    return int(side), mean, std


@torch.no_grad()
def _extracted(network: Network, images: Tensor, rows: int) -> Tensor:
    """Extract features in chunks, from the whole image scaled to the model's side (not cropped) and normalised."""
    embed, side, mean, std = network
    chunks = []
    for piece in images.clamp(0, 1).float().split(rows):
        pixels = F.interpolate(piece.to(mean.device), size=(side, side), mode="bicubic", antialias=True).clamp(0, 1)
        chunks.append(embed((pixels - mean) / std).float().cpu())
    return torch.cat(chunks)
