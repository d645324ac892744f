"""A tiny policy whose gradient passes through a base in another type on its way to the adapters, which are float32."""

import torch
from torch import nn

from diffalign.testing import TinyPolicy


class HalfBase(TinyPolicy):
    """Adds the update to the inputs of the base, which computes in float16. The first `overflows` calls with a graph overflow."""

    base = torch.float16
    overflows = 0

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.network.body.to(self.base)

    def velocity(self, latents, sigma, condition):
        self.counter.add(len(latents))
        inputs = torch.cat([latents.flatten(1), sigma[:, None], condition.tensors["embedding"]], dim=1)
        update = self.network.lora_B(self.network.lora_A(inputs))
        moved = inputs + nn.functional.pad(update, (0, inputs.shape[1] - update.shape[1]))
        velocity = self.network.body(moved.to(self.base)).to(latents.dtype)
        if velocity.requires_grad and self.overflows:
            self.overflows -= 1
            velocity.register_hook(lambda gradient: gradient * float("inf"))
        return velocity.reshape(latents.shape)


class WholeBase(HalfBase):
    """The same in float32."""

    base = torch.float32
