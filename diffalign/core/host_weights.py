"""Weights that stay in the host's memory until they are sharded over the processes of a run."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import attrs
import torch
from torch import nn


@attrs.define(eq=False)
class _Held:
    parameter: nn.Parameter  # kept alive, so that no other object gets its id
    dtype: torch.dtype
    writes: int | None = None  # version counter of the memory when it was lent; None while it is not lent


@attrs.define(eq=False)
class HostWeights:
    """Weights that wait in the host's memory, as they are in their files, until each process takes its part of them.

    This is for a network that does not fit a device, or that is too large for one copy per process and fork on a machine. Its weights
    wait from the moment they are loaded. They are mapped from the files, so the processes of a machine share the memory pages. A fork
    begins with equal weights, so it borrows the same memory, and gets its own when it is placed. `FullySharded` places the weights.
    """

    _held: dict[int, _Held] = attrs.field(factory=dict, init=False, repr=False)

    def hold(self, network: nn.Module, dtype: torch.dtype | None = None) -> None:
        """Let the weights of a network wait.

        Args:
            network: network on the host
            dtype: type that the weights get when they are placed; None keeps their own
        """
        for parameter in network.parameters():
            self._held[id(parameter)] = _Held(parameter, dtype or parameter.dtype)

    def holds(self, network: nn.Module) -> bool:
        """True while some weights of the network wait, so that it cannot be evaluated yet."""
        return bool(self._held) and any(id(parameter) in self._held for parameter in network.parameters())

    @contextmanager
    def posing(self) -> Iterator[None]:
        """Give the waiting weights their later type, without values, while the context is open. Code that adds layers needs the type."""
        waiting = [(held.parameter, held.parameter.data) for held in self._held.values()]
        for held in self._held.values():
            held.parameter.data = torch.zeros((), dtype=held.dtype).expand(held.parameter.shape)
        try:
            yield
        finally:
            for parameter, data in waiting:
                parameter.data = data

    def lend(self, parameters: Iterable[nn.Parameter]) -> dict[int, nn.Parameter]:
        """Make parameters for a fork that borrow the memory of those that wait: id of the waiting parameter -> new parameter."""
        lent: dict[int, nn.Parameter] = {}
        for parameter in parameters:
            if held := self._held.get(id(parameter)):
                twin = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
                held.writes = parameter._version  # torch counts writes to the memory, whichever tensor makes them
                self._held[id(twin)] = _Held(twin, held.dtype, held.writes)
                lent[id(parameter)] = twin
        return lent

    def place(self, module: nn.Module, device: torch.device, *, copy: bool) -> None:
        """Bring the waiting weights of a module to their device and type.

        Args:
            module: module whose weights are placed, all at once
            device: device of the process
            copy: give the weights memory of their own even if device and type are right already; not needed if they are copied next

        Raises:
            RuntimeError: weights were written while a fork borrowed their memory.
        """
        for name, parameter in module.named_parameters():
            held = self._held.pop(id(parameter), None)
            if held is None:
                continue
            if held.writes not in (None, parameter._version):
                raise RuntimeError(
                    f"{name} of a {type(module).__name__} was written while a fork had the same memory, so both have changed. Write "
                    "weights before the first fork, or after the loop is built, when they are sharded."
                )
            parameter.data = parameter.data.to(device, held.dtype, copy=copy)

    def require_none(self) -> None:
        """Check, after everything is placed, that no weights wait any more.

        Raises:
            ValueError: some weights still wait, because they belong to no policy of the run.
        """
        if self._held:
            shapes = [tuple(held.parameter.shape) for held in self._held.values()]
            raise ValueError(
                f"{len(shapes)} tensors (first: {shapes[0]}) wait to be sharded but belong to no policy of the run. Return their policy "
                "from Objective.policies(), or load it without `sharding`."
            )
