"""Adapters that are zero because a fork was made without them: the network does not compute them."""

from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from diffalign.core.spread import whole


@attrs.define(eq=False)
class LeftOut:
    """Adapters B A whose B is zero by construction, switched off in their network until a B is no longer zero.

    torch's count of writes tells whether a B was written, so most calls read no value.

    Args:
        network: network whose adapters are off
        factors: its factors B
    """

    network: nn.Module
    factors: Sequence[Tensor]
    _writes: int = attrs.field(init=False, default=0)
    _zero: bool = attrs.field(init=False, default=True)

    @classmethod
    @torch.no_grad()
    def of(cls, network: nn.Module, factors: Sequence[Tensor], *, trained: bool) -> "LeftOut | None":
        """Write zeros into the factors, and switch the adapters off. Adapters that will be trained stay on; then the result is None."""
        for factor in factors:
            factor.zero_()
        if trained:
            return None
        switch(network, on=False)
        made = cls(network, factors)
        made._writes = made._count()
        return made

    def holds(self) -> bool:
        """Check that the factors are still zero. If they are not, switch the adapters on."""
        writes = self._count()
        if self._zero and writes != self._writes:
            self._writes = writes
            self._zero = not any(bool(factor.any()) for factor in self.factors)  # a checkpoint writes the zeros again
            if not self._zero:
                switch(self.network, on=True)
        return self._zero

    def _count(self) -> int:
        return sum(factor._version for factor in self.factors)


def add_nothing(network: nn.Module, factors: Sequence[str]) -> bool:
    """Check that a network has adapters and that all their factors B are zero. Factors without memory, of a plan, are not known to be.

    Args:
        network: network with or without adapters
        factors: names of its factors B
    """
    parameters = dict(network.named_parameters())
    return bool(factors) and not any(parameters[name].is_meta or bool(whole(parameters[name]).any()) for name in factors)


def switch(network: Any, *, on: bool) -> None:
    """Switch the adapters of a network on or off. Each parameter still requires gradients as before."""
    trained = {parameter: parameter.requires_grad for parameter in network.parameters()}
    if on:
        network.enable_adapters()
    else:
        network.disable_adapters()
    for parameter, requires_grad in trained.items():
        parameter.requires_grad_(requires_grad)
