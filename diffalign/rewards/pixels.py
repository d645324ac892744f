"""Preparation of images for networks: resizing, cropping or padding, and normalising, all on tensors."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of CLIP's training images, by channel; BLIP uses the same."""


def check_batch(name: str, images: Tensor, prompts: Sequence[str]) -> None:
    """Refuse a batch that is not one image per prompt.

    Args:
        name: name of the reward in the message
        images: [K, 3, H, W] floating point in [0, 1]
        prompts: K prompts

    Raises:
        ValueError: shape or type of the images is wrong, or the numbers of images and prompts differ.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"{name} needs images [K, 3, H, W] of floating point numbers; got {tuple(images.shape)}, {images.dtype}")
    if len(images) != len(prompts):
        raise ValueError(f"{name} needs one prompt per image; got {len(images)} images and {len(prompts)} prompts")


def require_finite(name: str, images: Tensor, prompts: Sequence[str]) -> None:
    """Refuse images with a number that is not finite, where it would not reach the score: as 8 bits it is black, to a detector nothing.

    Args:
        name: name of the reward in the message
        images: [K, 3, H, W]
        prompts: K prompts

    Raises:
        ValueError: there is such an image; the message names the first one and its prompt.
    """
    bad = (~images.flatten(1).isfinite().all(dim=1)).nonzero().squeeze(1)
    if len(bad):
        first = int(bad[0])
        raise ValueError(
            f"{name} needs images of finite numbers; image {first} of {len(images)}, prompt {str(prompts[first])!r}, holds NaN or "
            "infinity. An autoencoder that overflows in float16 gives such images: load the policy in another dtype."
        )


def eight_bit(name: str, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Round images [K, 3, H, W] in [0, 1] to 8 bits, uint8 on the same device; arguments and error of `require_finite`."""
    require_finite(name, images, prompts)
    return (images.detach().clamp(0, 1) * 255).round().to(torch.uint8)


def resized(images: Tensor, height: int, width: int, mode: str = "bicubic") -> Tensor:
    """Resize with antialiasing: [K, 3, H, W] -> [K, 3, height, width] in [0, 1]. Bicubic overshoot is clamped, as in 8-bit images."""
    if images.shape[-2:] == (height, width):
        return images.clamp(0, 1)
    return F.interpolate(images, size=(height, width), mode=mode, antialias=True, align_corners=False).clamp(0, 1)


def cropped_square(images: Tensor, size: int) -> Tensor:
    """Resize the shorter side to `size` and take the middle: [K, 3, H, W] -> [K, 3, size, size]."""
    height, width = images.shape[-2:]
    short = min(height, width)
    if max(height, width) > 8 * short:  # crop a very long image first, instead of resizing parts that are cut off
        images = _middle(images, short)
        height, width = images.shape[-2:]
    images = resized(images, int(size * height / short), int(size * width / short))
    top, left = round((images.shape[-2] - size) / 2), round((images.shape[-1] - size) / 2)
    return images[..., top : top + size, left : left + size]


def _middle(images: Tensor, short: int) -> Tensor:
    """Crop a long image to at least four squares around the middle; the middle stays the same."""
    for axis in (-2, -1):
        length = images.shape[axis]
        kept = min(length, 4 * short + (length - 4 * short) % 2)
        images = images.narrow(axis, (length - kept) // 2, kept)
    return images


def padded_square(images: Tensor, size: int) -> Tensor:
    """Resize the longer side to `size` and pad both ends of the other with black: [K, 3, H, W] -> [K, 3, size, size]."""
    height, width = images.shape[-2:]
    long = max(height, width)
    images = resized(images, round(size * height / long), round(size * width / long))
    below, right = size - images.shape[-2], size - images.shape[-1]
    return F.pad(images, (right // 2, right - right // 2, below // 2, below - below // 2))


def normalized(images: Tensor, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> Tensor:
    """Normalise by channel, (x - mean) / std: [K, 3, H, W] -> [K, 3, H, W]."""
    return (images - images.new_tensor(mean)[:, None, None]) / images.new_tensor(std)[:, None, None]
