"""Small parts with known behaviour, for tests of other parts. None needs a download or a device, and each takes less than a second."""

import math
from collections.abc import Sequence
from typing import Self

import attrs
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffalign.core import (
    CPS,
    Condition,
    Policy,
    Progress,
    Prompt,
    Reward,
    Streams,
    TransitionKernel,
    fork_module,
    shifted_sigmas,
)
from diffalign.samplers import Branching, Plan

EMBEDDING = 4
"""Width of the prompt embedding of `TinyPolicy`."""


def embeddings(prompts: Sequence[str]) -> Tensor:
    """Embed prompts as `TinyPolicy` does, each by a fixed random vector for its text: [P, 4]."""
    return torch.stack([Streams(0).normal((EMBEDDING,), f"prompt {prompt}", 0, 0) for prompt in prompts])


class TinyNetwork(nn.Module):
    """Frozen network with a low-rank update: `body(u) + lora_B(lora_A(u))` for u = [latents, sigma, prompt embedding].

    Args:
        size: size of a flat latent
        hidden: width of the body
        rank: rank of the update
        delta: standard deviation of lora_B; 0 starts at the body exactly
        seed: seed of all weights
        checkpointing: recompute the body's activations in the backward pass
    """

    def __init__(self, size: int, hidden: int, rank: int, delta: float, seed: int, checkpointing: bool) -> None:
        super().__init__()
        width = size + 1 + EMBEDDING
        self.body = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, size))
        self.lora_A = nn.Linear(width, rank, bias=False)
        self.lora_B = nn.Linear(rank, size, bias=False)
        self.checkpointing = checkpointing
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                scale = delta if name.startswith("lora_B") else 1 / math.sqrt(parameter.shape[-1])
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        self.body.requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        body: Tensor = checkpoint(self.body, inputs, use_reentrant=False) if self.checkpointing else self.body(inputs)
        delta: Tensor = self.lora_B(self.lora_A(inputs))
        return body + delta


class TinyPolicy(Policy):
    """Policy with a few hundred weights, frozen except for a low-rank update. Its velocity depends on the prompt.

    The embedding of a prompt is a fixed random vector for its text, so a part that mixes up conditions gives other numbers.

    Args:
        latent_shape: shape of one sample, [*]
        kernel: the step rule; CPS by default
        dtype: type of weights, latents and grid; float64 for identities to 1e-10
        shift: shift of the sigma grid
        hidden, rank, delta, seed, checkpointing: arguments of the network, see `TinyNetwork`
    """

    def __init__(
        self,
        latent_shape: Sequence[int] = (3,),
        kernel: TransitionKernel | None = None,
        dtype: torch.dtype = torch.float32,
        shift: float = 2.0,
        hidden: int = 16,
        rank: int = 2,
        delta: float = 0.3,
        seed: int = 0,
        checkpointing: bool = False,
    ) -> None:
        super().__init__(kernel or CPS(), latent_shape)
        self.network = TinyNetwork(math.prod(latent_shape), hidden, rank, delta, seed, checkpointing).to(dtype)
        self.dtype, self.shift = dtype, shift
        self._own = frozenset(name for name, _ in self.network.named_parameters() if name.startswith("lora_"))

    def encode(self, prompts: Sequence[Prompt]) -> Condition:
        return Condition(tuple(prompts), torch.arange(len(prompts)), {"embedding": embeddings(prompts).to(self.device, self.dtype)})

    def decode(self, latents: Tensor) -> Tensor:
        """Decode to one pixel, whose channels are the sigmoid of the first three numbers of each sample: [K, *] -> [K, 3, 1, 1]."""
        channels = latents.flatten(1)[:, :3].sigmoid()
        return nn.functional.pad(channels, (0, 3 - channels.shape[1]))[:, :, None, None]

    def prior(self, noise: Tensor) -> Tensor:
        return noise.to(self.device, self.dtype)

    def sigmas(self, steps: int) -> Tensor:
        return shifted_sigmas(steps, self.shift).to(self.dtype)

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        self.counter.add(len(latents))
        inputs = torch.cat([latents.flatten(1), sigma[:, None].to(self.dtype), condition.tensors["embedding"]], dim=1)
        velocity: Tensor = self.network(inputs)
        return velocity.reshape(latents.shape)

    def fork(self, *, trainable: bool = False, pristine: bool = False) -> Self:
        twin = type(self)(self.latent_shape, self.kernel, self.dtype, self.shift)
        twin.network = fork_module(self.network, self._own, trainable=trainable)
        if pristine:
            nn.init.zeros_(twin.network.lora_B.weight)
        self.shares_tensors = twin.shares_tensors = True
        return twin


@attrs.frozen
class GivenPlan(Plan):
    """Plan that always draws the given branching.

    Args:
        branching: branching with as many steps as the sampler
    """

    branching: Branching

    def draw(self, steps: int, progress: Progress, streams: Streams) -> Branching:
        if steps != len(self.branching.children):
            raise ValueError(f"GivenPlan.branching is for {len(self.branching.children)} steps; the sampler has {steps}")
        return self.branching


@attrs.frozen
class ConstantReward(Reward):
    """Reward with the same score for every image.

    Args:
        value: the score
    """

    value: float = 1.0

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return images.new_full((len(images),), self.value)


def channel_reward(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Reward as a plain function: first channel minus half the second, plus a tenth of the length of the prompt, [K]."""
    length = images.new_tensor([float(len(prompt)) for prompt in prompts])
    return images[:, 0].mean(dim=(1, 2)) - images[:, 1].mean(dim=(1, 2)) / 2 + length / 10
