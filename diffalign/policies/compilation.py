"""Compilation of a denoiser and its forks by torch.compile."""

from collections.abc import Iterator
from typing import Any, Literal

import attrs
from torch import nn

_VARIANTS = 64


@attrs.frozen
class Compilation:
    """Compiles a denoiser in place. Every fork is compiled again: a copy of a compiled module is not compiled.

    torch keeps 8 compiled variants of a function; further variants run uncompiled, with only a warning. Blocks of one class in several
    forks, with and without gradient, need more than 8. So a lower limit is raised to 64 for the process.

    Args:
        scope: "blocks" compiles the repeated blocks one by one, which takes much less time; "network" compiles the whole network
        backend: backend of torch.compile
        dynamic: whether sizes may change without compiling again; None lets torch decide
    """

    scope: Literal["blocks", "network"] = "blocks"
    backend: str = "inductor"
    dynamic: bool | None = None

    def apply(self, network: nn.Module) -> None:
        """Compile the modules that are not compiled yet.

        Raises:
            ValueError: no repeated blocks are known.
        """
        parts = [network] if self.scope == "network" else list(_blocks(network))
        if not parts:
            raise ValueError(f"Compilation.scope 'blocks' needs repeated blocks, and {type(network).__name__} has none; take 'network'")
        from torch._dynamo import config  # imported here, because it is slow and seldom needed

        config.recompile_limit = max(config.recompile_limit, _VARIANTS)
        for part in parts:
            if self.scope == "network" or getattr(part, "_compiled_call_impl", None) is None:
                part.compile(backend=self.backend, dynamic=self.dynamic)


def _blocks(network: Any) -> Iterator[nn.Module]:
    """Yield the modules of the classes that the network names; without names, the members of its lists of equal modules."""
    if named := getattr(network, "_repeated_blocks", None):
        yield from (module for module in network.modules() if type(module).__name__ in named)
        return
    for child in network.children():
        if isinstance(child, nn.ModuleList) and len({type(block) for block in child}) == 1:
            yield from child
