"""Compilation of a denoiser and its forks by torch.compile: one program for each class of modules."""

import functools
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from types import MethodType
from typing import Any, Literal

import attrs
import torch
from torch import Tensor, nn

from diffalign.core.unessential import say
from diffalign.core.words import allowed_word

_VARIANTS = 64
"""Graphs of one function that torch keeps; beyond its default of 8 a block would silently run as it is."""


@attrs.frozen
class Compilation:
    """Compiles a denoiser in place. All blocks of one class, and all forks, share one compiled function, which takes weights as inputs.

    torch makes a graph for each structure of a block (SD3.5-M has two that repeat: with a second attention and without), and for each of
    these more: gradients on or off, weights that are trained or frozen, adapters on or off. The number of rows is a symbol. So the number
    of graphs does not grow with blocks, forks, prompts or levels of a tree. Where a graph would serve few calls, none is made, and the
    block runs as it is:

    - a block whose structure no other block of the network has (the last one of SD3.5-M);
    - a call of one row without gradient, since torch compiles one row apart: such calls wait for the host, which `CallGraphs` takes away;
    - the first block of an update, whose input carries no gradient as that of the others does.

    Where torch cannot compile a class, it runs as it is from there on; a line says so once.

    Args:
        scope: "blocks" compiles the repeated blocks, which takes much less time; "network" compiles the whole network
        backend: backend of torch.compile
        dynamic: sizes that may change without compiling again. None: the number of rows, and what torch sees changing. True: all from
            the start, which makes slower kernels. False: none, so that each number of rows is compiled
    """

    scope: Literal["blocks", "network"] = attrs.field(default="blocks", validator=allowed_word)
    backend: str = "inductor"
    dynamic: bool | None = None

    @property
    def every_call(self) -> bool:
        """True if calls that few graphs would serve are compiled as well."""
        return self.scope == "network" or self.dynamic is False

    def apply(self, network: nn.Module) -> None:
        """Compile the modules that are not compiled yet. Nothing is computed before their first call.

        Raises:
            ValueError: no repeated blocks are known, or torch has no such backend.
        """
        parts = [network] if self.scope == "network" else _repeated(list(_blocks(network)))
        if not parts:
            raise ValueError(f"Compilation.scope 'blocks' needs repeated blocks, and {type(network).__name__} has none; take 'network'")
        for part in parts:
            if not compiled(part):  # a copy of a compiled module is compiled: the method is bound to the copy
                part.forward = MethodType(_program(type(part), self), part)  # type: ignore[arg-type]  # mypy looks at the hash of instances


def compiled(module: nn.Module) -> bool:
    """Return whether a module runs a program of `Compilation`."""
    forward = vars(module).get("forward")
    return isinstance(forward, MethodType) and isinstance(forward.__func__, _Program)


class _Program:
    """Compiled `forward` of one class, which is called with an instance."""

    def __init__(self, kind: type[nn.Module], compilation: Compilation) -> None:
        from torch._dynamo import config, exc, list_backends, maybe_mark_dynamic  # slow to import, and seldom needed
        from torch._functorch import config as differentiation

        config.recompile_limit = max(config.recompile_limit, _VARIANTS)
        differentiation.force_non_lazy_backward_lowering = True  # else a failure comes in the backward pass, too late to fall back
        self.name = kind.__name__
        self.plain: Any = kind.forward
        try:
            self.compiled = torch.compile(self.plain, backend=compilation.backend, dynamic=compilation.dynamic)
        except exc.InvalidBackend as error:
            raise ValueError(f"Compilation.backend must be one of {', '.join(list_backends())}; got {compilation.backend!r}") from error
        self.shared = not compilation.every_call
        self.mark: Any = maybe_mark_dynamic if compilation.dynamic is None else None
        self.refusal: type[Exception] = exc.TorchDynamoException
        self.failed = False

    def _seldom(self, module: nn.Module, tensors: Sequence[Tensor]) -> bool:
        """True if a graph would be made that few calls use."""
        if not self.shared or not tensors:
            return False
        if not torch.is_grad_enabled():
            return len(tensors[0]) == 1
        return not any(tensor.requires_grad for tensor in tensors) and any(weight.requires_grad for weight in module.parameters())

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim]
        if self.failed or any(tensor.is_meta for tensor in tensors) or self._seldom(module, tensors):  # without memory: only counted
            return self.plain(module, *args, **kwargs)
        for tensor in tensors if self.mark is not None else ():
            if tensor.shape[0] == tensors[0].shape[0]:
                self.mark(tensor, 0)
        try:
            return self.compiled(module, *args, **kwargs)
        except self.refusal as error:
            cause = getattr(error, "inner_exception", error)
            if isinstance(cause, torch.OutOfMemoryError):  # the loop takes fewer rows
                raise cause from error
            self.failed = True
            lines = str(cause).strip().splitlines() or [""]
            reason = f"{type(cause).__name__}: {lines[0][:300]}"
            say(f"compilation: torch cannot compile {self.name}, which runs as it is from here on ({reason})")
        return self.plain(module, *args, **kwargs)


@functools.cache
def _program(kind: type[nn.Module], compilation: Compilation) -> _Program:
    return _Program(kind, compilation)


def _repeated(blocks: Sequence[nn.Module]) -> Sequence[nn.Module]:
    """Select blocks whose structure other blocks have too; all, if there are none."""
    structures = [_structure(block) for block in blocks]
    times = Counter(structures)
    return [block for block, structure in zip(blocks, structures, strict=True) if times[structure] > 1] or blocks


def _structure(block: nn.Module) -> Hashable:
    modules = tuple((name, type(module)) for name, module in block.named_modules())
    return modules, tuple((name, tuple(weight.shape)) for name, weight in block.named_parameters())


def _blocks(network: Any) -> Iterator[nn.Module]:
    """Yield the modules of the classes that the network names; without names, the members of its lists of equal modules."""
    if named := getattr(network, "_repeated_blocks", None):
        yield from (module for module in network.modules() if type(module).__name__ in named)
        return
    for child in network.children():
        if isinstance(child, nn.ModuleList) and len({type(block) for block in child}) == 1:
            yield from child
