"""Reduction of images of any size to the 8 x 8 grey values that all rewards and measures use."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .handwriting import SIDE


def ink_of(images: Tensor) -> Tensor:
    """Compute the ink of 8 x 8 fields: the mean over channels, then over each field (adaptive average pooling).

    Args:
        images: [K, 3, H, W] in [0, 1], floating point, H and W at least 8, on any device; white is ink

    Returns:
        float32 [K, 8, 8] in [0, 1], on the CPU: one copy of 256 bytes per image.

    Raises:
        ValueError: shape or type is wrong, or values are NaN or outside [0, 1] by more than 0.001.
    """
    if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < SIDE or not images.is_floating_point():
        raise ValueError(
            f"digits are read from floating point images of shape (K, 3, H, W), H and W at least {SIDE}; got {images.dtype} of shape "
            f"{tuple(images.shape)}. Give what `DigitsPolicy.decode` gives."
        )
    low, high = (float(bound) for bound in images.detach().aminmax()) if images.numel() else (0.0, 1.0)
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # this form also refuses NaN
        raise ValueError(f"digits are read from images with values in [0, 1]; got values from {low:.3g} to {high:.3g}")
    grey = images.detach().to(torch.float32).mean(dim=1, keepdim=True)
    return F.adaptive_avg_pool2d(grey, SIDE)[:, 0].cpu().clamp(0, 1)


def latents_of(images: Tensor) -> Tensor:
    """Compute the same fields from -1 (paper) to 1 (ink), as a flat vector: float32 [K, 64] on the CPU. Errors as in `ink_of`."""
    return ink_of(images).flatten(1) * 2 - 1
