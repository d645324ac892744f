"""Sizes of parts in bytes, computed from their shapes."""

import inspect

import torch
from torch import Tensor, nn

from ..core import Policy
from ..policies import FlowMatchingPolicy
from ..policies.diffusers.unet import UNetFamily
from .rows import innermost


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of the tensor's values."""
    return tensor.numel() * tensor.element_size()


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes that an optimizer will keep, measured on a parameter of 64 numbers."""
    probe = nn.Parameter(torch.zeros(8, 8))
    probe.grad = torch.zeros_like(probe)
    twin = type(optimizer)([probe], **{name: value for name, value in optimizer.defaults.items() if name in _arguments(optimizer)})
    try:
        twin.step()
    except (RuntimeError, TypeError):  # the optimizer needs a closure, so its state is not known
        return 0
    kept = sum(tensor_bytes(value) for value in twin.state[probe].values() if isinstance(value, Tensor) and value.numel() > 1)
    numbers: int = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
    return round(kept / probe.numel() * numbers)


def _arguments(optimizer: torch.optim.Optimizer) -> set[str]:
    return set(inspect.signature(type(optimizer)).parameters)


_NOT_PER_TOKEN = ("norm", "embed", "lora", "modulation", "_mod.", "add_", "context", "txt", "caption")
"""Words in the names of layers that do not see every token of the image: their input is one vector a row, or the text."""


def tokens(policy: Policy) -> int:
    """Number of image tokens of one row: as the family says, else as far as the network's configuration tells, else 1.

    It is 0 for a UNet, whose layers see different numbers of them.
    """
    inner = innermost(policy)
    if isinstance(inner, FlowMatchingPolicy):
        return 0 if isinstance(inner.family, UNetFamily) else inner.family.tokens
    config = getattr(dict(inner.named_children()).get("network"), "config", None)
    if config is None or len(policy.latent_shape) != 3:
        return 1
    patch = getattr(config, "patch_size", 1)
    return int(policy.latent_shape[1] * policy.latent_shape[2]) // (patch * patch if isinstance(patch, int) else 1)


def token_layers(policy: Policy) -> list[nn.Linear]:
    """Linear layers that see every token of the image."""
    named = [(name, module) for name, module in policy.named_modules() if isinstance(module, nn.Linear)]
    return [layer for name, layer in named if not any(word in name for word in _NOT_PER_TOKEN)]


def activation_bytes(policy: Policy) -> int:
    """Bytes of the inputs of the linear layers for one network row: most of what a backward pass keeps without activation checkpointing.

    This is a guess for transformers; other networks give 0.
    """
    layers = token_layers(policy)
    numbers: int = sum(layer.in_features for layer in layers)
    return tokens(policy) * numbers * (policy.precision.itemsize if layers else 0)


def figures(number: float) -> str:
    """Number with three figures; one above 1000 has all that lie before the point, and no power of ten."""
    return f"{number:.0f}" if number >= 999.5 else f"{number:.3g}"


def size(count: float) -> str:
    """Byte count as B, KiB, MiB or GiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
