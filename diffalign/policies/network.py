"""Policy around any velocity network."""

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Self

import torch
from torch import Tensor, nn

from diffalign.core import CPS, Condition, Policy, Prompt, TransitionKernel, fork_module, shifted_sigmas

Decode = Callable[[Tensor], Tensor]


class NetworkPolicy(Policy):
    """Policy around your own network without prompts, which predicts v = noise - x_0: `network(latents [B, *], sigma [B]) -> [B, *]`.

    Parameters that require gradients are trained; forks share the others. Latents at sigma 1 are unit noise.

    Args:
        network: the velocity field
        latent_shape: shape of one sample, [*]
        decode: latents [K, *] -> images [K, 3, H, W] in [0, 1]; by default latents are images from -1 to 1 already. A module is
            neither trained nor saved, and decodes in evaluation mode; it moves with the policy, and forks share it
        kernel: the step rule; CPS by default
        shift: shift of the sigma grid
        own: names of the network's parameters that a fork owns; by default those that require gradients
    """

    _decode: Decode | None

    def __init__(
        self,
        network: nn.Module,
        latent_shape: Sequence[int],
        decode: Decode | None = None,
        kernel: TransitionKernel | None = None,
        shift: float = 1.0,
        own: Collection[str] | None = None,
    ) -> None:
        super().__init__(kernel or CPS(), latent_shape)
        self.network = network
        self.shift = shift
        self.__dict__["_decode"] = decode  # past torch, which would take a module for weights of the policy
        trained = (name for name, parameter in network.named_parameters() if parameter.requires_grad)
        self._own = frozenset(trained if own is None else own)

    def encode(self, prompts: Sequence[Prompt]) -> Condition:
        return Condition(tuple(prompts), torch.arange(len(prompts)), {})

    def decode(self, latents: Tensor) -> Tensor:
        if self._decode is None:
            return ((latents + 1) / 2).clamp(0, 1)
        if isinstance(self._decode, nn.Module):
            with suppress(NotImplementedError):  # a program of torch.export has the one mode that it was exported in
                self._decode.eval()  # it is no submodule, so the policy's own `eval` and `train` do not reach it
        return self._decode(latents)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        moved = super()._apply(fn, recurse)
        if isinstance(self._decode, nn.Module):
            self._decode._apply(fn)
        return moved

    def prior(self, noise: Tensor) -> Tensor:
        return noise.to(self.device)

    def sigmas(self, steps: int) -> Tensor:
        return shifted_sigmas(steps, self.shift)

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        self.counter.add(len(latents))
        predicted: Tensor = self.network(latents, sigma)
        return predicted

    def own_parameters(self) -> dict[str, nn.Parameter]:
        return {f"network.{name}": parameter for name, parameter in self.network.named_parameters() if name in self._own}

    def fork(self, *, trainable: bool = False, pristine: bool = False) -> Self:
        if pristine:
            raise ValueError("fork(pristine=True) needs LoRA adapters to leave out; a NetworkPolicy has none. Fork it before training.")
        network = fork_module(self.network, self._own, trainable=trainable)
        twin = type(self)(network, self.latent_shape, self._decode, self.kernel, self.shift, self._own)
        if len(self._own) < len(list(self.network.parameters())) or isinstance(self._decode, nn.Module):
            self.shares_tensors = twin.shares_tensors = True
        return twin
