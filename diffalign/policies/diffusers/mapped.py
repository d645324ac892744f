"""Denoiser on the host, mapped from its files, so that no process has its own copy."""

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
    """Common type of all weights in a component's safetensors files; None if there are several types or no such files.

    Args:
        folder: folder of the component, as diffusers writes it
        variant: variant of its files
    """
    from safetensors import safe_open

    found: set[torch.dtype | None] = set()
    for stored in stored_files(folder, variant):
        with safe_open(stored, "pt") as file:
            found.update(_TYPES.get(file.get_slice(key).get_dtype()) for key in file.keys())  # noqa: SIM118  not a mapping
    return found.pop() if len(found) == 1 else None


def loading_dtype(folder: Path, source: Sequence[str], dtype: torch.dtype, variant: str | None = None) -> torch.dtype:
    """Type in which a waiting denoiser is loaded: that of its files, so that it can stay mapped, if a later cast gives equal weights.

    A later cast differs if diffusers keeps some modules in float32. float16 is left out too: the digest of a base would be rounded by it.

    Args:
        folder: folder of the component
        source: module and class of the denoiser, as model_index.json names them
        dtype: type that is wanted
        variant: variant of its files
    """
    library, name = source
    kind = getattr(importlib.import_module(library), name) if library == "diffusers" else None
    equal = kind is not None and dtype != torch.float16 and not kind._keep_in_fp32_modules
    return (stored_dtype(folder, variant) if equal else None) or dtype


def hold(network: Any, loaded: torch.dtype, dtype: torch.dtype, host: HostWeights) -> Any:
    """Give a denoiser the state as if it had been loaded in `dtype`; its weights take that type when they are placed.

    Args:
        network: denoiser on the host
        loaded: type in which it was loaded, that of its files
        dtype: type that is wanted
        host: holds the weights from now on
    """
    if loaded == dtype:
        host.hold(network)
        return network
    network = _rebuilt(network, dtype)
    host.hold(network, dtype)
    return network


def _rebuilt(network: Any, dtype: torch.dtype) -> Any:
    """Build the network again under another default type, in which its constructor computes buffers, and give it the same weights."""
    from accelerate.big_modeling import init_empty_weights

    weights = {name for name, _ in network.named_parameters()}
    state = {name: tensor if name in weights else tensor.to(dtype) for name, tensor in network.state_dict().items()}
    with default_dtype(dtype), torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        twin: nn.Module = type(network).from_config(network.config)
    twin.load_state_dict(state, assign=True)
    return twin


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make this the floating type of new tensors while the context is open."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
