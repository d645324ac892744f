"""Weights that stay in the host's memory until they are spread over the processes of a run."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import attrs
import torch
from torch import nn


@attrs.define(eq=False)
class _Held:
    parameter: nn.Parameter  # which keeps its id from being given to another
    dtype: torch.dtype
    writes: int | None = None  # that it had seen when its memory was lent; None while the memory is its own


@attrs.define(eq=False)
class HostWeights:
    """Weights that wait in the host's memory, as their files have them, until each process takes its part of them.

    A network that does not fit a device, or of which a machine cannot hold a copy for each process and each fork, is held from the
    moment it is loaded. It is mapped from its files, so the processes of a machine share the pages. Forks begin with equal weights:
    they are lent the memory, and have their own when they are placed. Whoever holds weights back is asked for them by `FullySharded`.
    """

    _held: dict[int, _Held] = attrs.field(factory=dict, init=False, repr=False)

    def hold(self, network: nn.Module, dtype: torch.dtype | None = None) -> None:
        """Keep the weights of a network back.

        Args:
            network: on the host
            dtype: that its weights take when they are placed; None leaves them theirs
        """
        for parameter in network.parameters():
            self._held[id(parameter)] = _Held(parameter, dtype or parameter.dtype)

    def holds(self, network: nn.Module) -> bool:
        """True while some weights of the network wait, so that it cannot be evaluated yet."""
        return bool(self._held) and any(id(parameter) in self._held for parameter in network.parameters())

    @contextmanager
    def posing(self) -> Iterator[None]:
        """While it is open, the weights that wait have their later type, and no values: for whoever adds layers to a network."""
        waiting = [(held.parameter, held.parameter.data) for held in self._held.values()]
        for held in self._held.values():
            held.parameter.data = torch.zeros((), dtype=held.dtype).expand(held.parameter.shape)
        try:
            yield
        finally:
            for parameter, data in waiting:
                parameter.data = data

    def lend(self, parameters: Iterable[nn.Parameter]) -> dict[int, nn.Parameter]:
        """For a fork: parameters of its own over the memory of those that wait, by the ids of these."""
        lent: dict[int, nn.Parameter] = {}
        for parameter in parameters:
            if held := self._held.get(id(parameter)):
                twin = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
                held.writes = parameter._version  # counted for the memory, whoever writes
                self._held[id(twin)] = _Held(twin, held.dtype, held.writes)
                lent[id(parameter)] = twin
        return lent

    def place(self, module: nn.Module, device: torch.device, *, copy: bool) -> None:
        """Bring the weights of a module that wait to their device and type.

        Args:
            module: all of it is placed at once
            device: of the process
            copy: give them memory of their own even where device and type are theirs already; not needed if they are copied next

        Raises:
            RuntimeError: weights were written after a fork, which had been lent their memory.
        """
        for name, parameter in module.named_parameters():
            held = self._held.pop(id(parameter), None)
            if held is None:
                continue
            if held.writes not in (None, parameter._version):
                raise RuntimeError(
                    f"{name} of a {type(module).__name__} was written while a fork had the same memory, so both have changed. Write "
                    "weights before the first fork, or after the loop is built, when they are spread."
                )
            parameter.data = parameter.data.to(device, held.dtype, copy=copy)

    def require_none(self) -> None:
        """After everything is placed.

        Raises:
            ValueError: some weights still wait, because they belong to no policy of the run.
        """
        if self._held:
            shapes = [tuple(held.parameter.shape) for held in self._held.values()]
            raise ValueError(
                f"{len(shapes)} tensors (first: {shapes[0]}) wait to be spread and belong to no policy of the run. Return their policy "
                "from Objective.policies(), or load it without `sharding`."
            )
