"""Images as networks take them: resized, cropped or padded, normalised, all in tensors."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's training images, by channel; BLIP uses the same."""


def check_batch(name: str, images: Tensor, prompts: Sequence[str]) -> None:
    """Refuse what is not one image per prompt.

    Args:
        name: the reward, for the message
        images: [K, 3, H, W] floating point in [0, 1]
        prompts: length K
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"{name} needs images [K, 3, H, W] of floating point numbers; got {tuple(images.shape)}, {images.dtype}")
    if len(images) != len(prompts):
        raise ValueError(f"{name} needs one prompt per image; got {len(images)} images and {len(prompts)} prompts")


def resized(images: Tensor, height: int, width: int, mode: str = "bicubic") -> Tensor:
    """[K, 3, H, W] -> [K, 3, height, width] with antialiasing, in [0, 1]; bicubic overshoot is cut off, as it is in 8-bit images."""
    if images.shape[-2:] == (height, width):
        return images.clamp(0, 1)
    return F.interpolate(images, size=(height, width), mode=mode, antialias=True, align_corners=False).clamp(0, 1)


def cropped_square(images: Tensor, size: int) -> Tensor:
    """The shorter side resized to `size`, then the middle: [K, 3, H, W] -> [K, 3, size, size]."""
    height, width = images.shape[-2:]
    short = min(height, width)
    if max(height, width) > 8 * short:  # the ends of a sliver are not resized only to be cut off
        images = _middle(images, short)
        height, width = images.shape[-2:]
    images = resized(images, int(size * height / short), int(size * width / short))
    top, left = round((images.shape[-2] - size) / 2), round((images.shape[-1] - size) / 2)
    return images[..., top : top + size, left : left + size]


def _middle(images: Tensor, short: int) -> Tensor:
    """At least four squares around the middle, which stays where it is."""
    for axis in (-2, -1):
        length = images.shape[axis]
        kept = min(length, 4 * short + (length - 4 * short) % 2)
        images = images.narrow(axis, (length - kept) // 2, kept)
    return images


def padded_square(images: Tensor, size: int) -> Tensor:
    """The longer side resized to `size`, the rest black on both sides: [K, 3, H, W] -> [K, 3, size, size]."""
    height, width = images.shape[-2:]
    long = max(height, width)
    images = resized(images, round(size * height / long), round(size * width / long))
    below, right = size - images.shape[-2], size - images.shape[-1]
    return F.pad(images, (right // 2, right - right // 2, below // 2, below - below // 2))


def normalized(images: Tensor, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> Tensor:
    """(x - mean) / std by channel: [K, 3, H, W] -> [K, 3, H, W]."""
    return (images - images.new_tensor(mean)[:, None, None]) / images.new_tensor(std)[:, None, None]
