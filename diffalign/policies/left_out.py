"""Adapters that are zero because a fork was made without them: the network does not compute them."""

from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn


@attrs.define(eq=False)
class LeftOut:
    """Adapters B A whose B is zero by construction, switched off in their network until somebody writes another number into a B.

    Whether anybody has written is told by torch's count of writes, so a call looks at no number.

    Args:
        network: whose adapters are off
        factors: its B
    """

    network: nn.Module
    factors: Sequence[Tensor]
    _writes: int = attrs.field(init=False, default=0)
    _zero: bool = attrs.field(init=False, default=True)

    @classmethod
    @torch.no_grad()
    def of(cls, network: nn.Module, factors: Sequence[Tensor], *, trained: bool) -> "LeftOut | None":
        """Write zeros into the factors, and switch the adapters off unless they will be trained; then there is nothing to watch."""
        for factor in factors:
            factor.zero_()
        if trained:
            return None
        switch(network, on=False)
        made = cls(network, factors)
        made._writes = made._count()
        return made

    def holds(self) -> bool:
        """Whether the factors are zero yet; once they are not, the adapters are on."""
        writes = self._count()
        if self._zero and writes != self._writes:
            self._writes = writes
            self._zero = not any(bool(factor.any()) for factor in self.factors)  # a checkpoint writes the zeros again
            if not self._zero:
                switch(self.network, on=True)
        return self._zero

    def _count(self) -> int:
        return sum(factor._version for factor in self.factors)


def switch(network: Any, *, on: bool) -> None:
    """Have the network compute its adapters, or not; what requires gradients stays as it was."""
    trained = {parameter: parameter.requires_grad for parameter in network.parameters()}
    if on:
        network.enable_adapters()
    else:
        network.disable_adapters()
    for parameter, requires_grad in trained.items():
        parameter.requires_grad_(requires_grad)
