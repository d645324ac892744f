"""Packing of latents into tokens of 2x2 patches, for FLUX.1 and Qwen-Image."""

from torch import Tensor


def pack(latents: Tensor) -> Tensor:
    """Pack latents into tokens: [B, C, H, W] -> [B, H/2 W/2, 4 C]."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, 4 * channels)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Unpack tokens into latents: [B, H/2 W/2, 4 C] -> [B, C, H, W]."""
    batch, _, channels = tokens.shape
    patches = tokens.reshape(batch, height // 2, width // 2, channels // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // 4, height, width)
