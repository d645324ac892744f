"""Tensors of which each process holds a part: torch's DTensor, as `fully_shard` makes them of weights."""

from typing import Any

import torch
from torch import Tensor


def is_spread(tensor: Tensor) -> bool:
    """True if each process holds only a part of the tensor.

    It looks at the tensor's methods, because importing DTensor takes a second that most runs do not need.
    """
    return hasattr(tensor, "full_tensor")


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """Part of the tensor that this process holds, sharing its memory; the whole tensor if it is not spread."""
    spread: Any = tensor
    part: Tensor = spread.to_local() if is_spread(tensor) else tensor.detach()
    return part


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, in every process. Every process must call this, because the parts are gathered."""
    spread: Any = tensor
    gathered: Tensor = spread.full_tensor() if is_spread(tensor) else tensor
    return gathered.detach()


def spread_like(value: Tensor, tensor: Tensor) -> Tensor:
    """Lay out a whole value like another tensor: each process keeps its part, and nothing is sent.

    Args:
        value: equal in all processes
        tensor: tensor of the same shape; if it is not spread, the value stays as it is
    """
    if not is_spread(tensor):
        return value
    from torch.distributed.tensor import distribute_tensor

    layout: Any = tensor
    part: Tensor = distribute_tensor(value.to(layout.device), layout.device_mesh, layout.placements, src_data_rank=None)
    return part
