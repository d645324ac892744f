"""Networks: the velocity of the flow, and the classifier that judges images."""

import math

import torch
from torch import Tensor, nn

from .handwriting import SIDE

PIXELS = SIDE * SIDE
FREQUENCIES = 8
ASKED = 12
"""Size of a condition: one number per digit, one for thin, one for thick."""


class VelocityNetwork(nn.Module):
    """Residual network on the pixels of an image, which gets sigma and the prompt at every layer.

        h_0 = in([x, e]),   h_{l+1} = h_l + mlp_l(norm(h_l + time(e) + prompt(c))),   v = out(norm(h_L))

    with e the sines and cosines of sigma at eight octaves. By default it has 1.3 million parameters.

    Args:
        width: width of the hidden layers
        depth: number of residual layers
    """

    def __init__(self, width: int = 384, depth: int = 4) -> None:
        super().__init__()
        self.width, self.depth = width, depth
        waves = 2 * FREQUENCIES
        self.inward = nn.Linear(PIXELS + waves, width)
        self.time = nn.Linear(waves, width)
        self.prompt = nn.Sequential(nn.Linear(ASKED, width // 4), nn.SiLU(), nn.Linear(width // 4, width))
        self.layers = nn.ModuleList(_layer(width) for _ in range(depth))
        self.outward = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, PIXELS))

    def forward(self, latents: Tensor, sigma: Tensor, classes: Tensor, thickness: Tensor) -> Tensor:
        """Velocity of latents [B, 1, 8, 8] at sigma [B] for `classes` [B, 10] (1 = allowed) and `thickness` [B, 2]: [B, 1, 8, 8]."""
        angles = sigma[:, None] * math.pi * 2.0 ** torch.arange(-1, FREQUENCIES - 1, device=sigma.device, dtype=sigma.dtype)
        waves = torch.cat([angles.sin(), angles.cos()], dim=1)
        told = self.time(waves) + self.prompt(torch.cat([classes, thickness], dim=1))
        hidden = self.inward(torch.cat([latents.flatten(1), waves], dim=1))
        for layer in self.layers:
            hidden = hidden + layer(hidden + told)
        velocity: Tensor = self.outward(hidden)
        return velocity.view_as(latents)


def _layer(width: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))


class JudgeNetwork(nn.Module):
    """Classifier of images [K, 1, 8, 8] in [-1, 1] into ten digits: two convolutions, two dense layers, 0.15 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * PIXELS // 4, 128),
            nn.ReLU(),
            nn.Linear(128, 10),
        )

    def forward(self, pictures: Tensor) -> Tensor:
        """Compute the logits of images: [K, 1, 8, 8] -> [K, 10]."""
        logits: Tensor = self.body(pictures)
        return logits
