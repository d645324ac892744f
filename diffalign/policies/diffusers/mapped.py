"""A denoiser on the host, mapped from its files: no process has a copy of its own."""

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffalign.core import HostWeights

from .source import stored_files

_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def stored_dtype(folder: Path, variant: str | None = None) -> torch.dtype | None:
    """The one type of all weights in a component's safetensors files; None where there are several, or no such files.

    Args:
        folder: of the component, as diffusers writes it
        variant: of its files
    """
    from safetensors import safe_open

    found: set[torch.dtype | None] = set()
    for stored in stored_files(folder, variant):
        with safe_open(stored, "pt") as file:
            found.update(_TYPES.get(file.get_slice(key).get_dtype()) for key in file.keys())  # noqa: SIM118  not a mapping
    return found.pop() if len(found) == 1 else None


def loading_dtype(folder: Path, source: Sequence[str], dtype: torch.dtype, variant: str | None = None) -> torch.dtype:
    """The type in which a denoiser that waits is to be loaded: that of its files, so that it can stay mapped, where a later cast is equal.

    It is not equal where diffusers keeps some modules in float32, and in float16, through which the digest of a base would be rounded.

    Args:
        folder: of the component
        source: module and class of the denoiser, as model_index.json names them
        dtype: that is wanted
        variant: of its files
    """
    library, name = source
    kind = getattr(importlib.import_module(library), name) if library == "diffusers" else None
    equal = kind is not None and dtype != torch.float16 and not kind._keep_in_fp32_modules
    return (stored_dtype(folder, variant) if equal else None) or dtype


def hold(network: Any, loaded: torch.dtype, dtype: torch.dtype, host: HostWeights) -> Any:
    """The denoiser as if it had been loaded in `dtype`, but for its weights, which take that type when they are placed.

    Args:
        network: on the host
        loaded: the type that was asked for, that of its files
        dtype: the type that is wanted
        host: holds the weights from now on
    """
    if loaded == dtype:
        host.hold(network)
        return network
    network = _rebuilt(network, dtype)
    host.hold(network, dtype)
    return network


def _rebuilt(network: Any, dtype: torch.dtype) -> Any:
    """The same weights in a network that was constructed under another default type, in which its constructor then computes."""
    from accelerate.big_modeling import init_empty_weights

    weights = {name for name, _ in network.named_parameters()}
    state = {name: tensor if name in weights else tensor.to(dtype) for name, tensor in network.state_dict().items()}
    with default_dtype(dtype), torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        twin: nn.Module = type(network).from_config(network.config)
    twin.load_state_dict(state, assign=True)
    return twin


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """While it is open, new tensors have this floating type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
