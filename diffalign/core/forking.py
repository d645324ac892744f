"""Copies of a network that share everything that is not trained."""

import copy
from collections.abc import Collection, Mapping
from typing import TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def view_of(module: Module, **attributes: object) -> Module:
    """Make a view: the same module with other values of some attributes. Everything else is shared, so it is cheap; it is not a fork.

    Args:
        module: the module that is shared
        attributes: submodules or plain values that the view has of its own
    """
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    for name, value in attributes.items():
        setattr(twin, name, value)
    return twin


def fork_module(module: Module, own: Collection[str], *, trainable: bool, lent: Mapping[int, nn.Parameter] | None = None) -> Module:
    """Build a second module tree that owns copies of the parameters named `own` and shares the rest with `module`.

    Submodules below which nothing is owned are shared as modules, not only as tensors, so a shared leaf is one object to every fork:
    sharding or casting it once serves all. So are their plain attributes: two attentions that have one processor still have one, which
    compiled graphs rely on. Training mode, hooks and `torch.compile` are kept: deepcopy would drop the last silently.

    Args:
        module: the network
        own: names of parameters (as `named_parameters` gives them) that the fork must own
        trainable: whether these require gradients in the fork
        lent: parameters that the fork takes instead of copies, by the id of the one they stand for
    """
    own = frozenset(own)
    known = {name for name, _ in module.named_parameters()}
    if strangers := own - known:
        raise ValueError(f"own must name parameters of {type(module).__name__}; it has no {sorted(strangers)[0]!r}")
    owned = {id(parameter) for name, parameter in module.named_parameters() if name in own}  # ids: tied weights have several names
    memo: dict[int, object] = {key: parameter for key, parameter in (lent or {}).items() if key in owned}
    for path, submodule in module.named_modules():
        if path and owned.isdisjoint(map(id, submodule.parameters())):
            memo[id(submodule)] = submodule
            memo |= {id(value): value for name, value in vars(submodule).items() if not name.startswith("_")}  # others may have them too
            continue
        for parameter in submodule.parameters(recurse=False):
            if id(parameter) not in owned:
                memo[id(parameter)] = parameter
        for buffer in submodule.buffers(recurse=False):
            memo[id(buffer)] = buffer
    twin = copy.deepcopy(module, memo)
    for name, parameter in twin.named_parameters():
        if name in own:
            parameter.requires_grad_(trainable)
            parameter.grad = None
    if getattr(module, "_compiled_call_impl", None) is not None:
        twin.compile()
    return twin
