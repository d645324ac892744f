"""How a GPU computes: which of torch's attention kernels it may take, and whether convolutions round to TF32.

Both are switches of the process. A context around the network's forward pass would not do: activation checkpointing calls the network
again in the backward pass, where nobody stands in that context, and a replay has to take the kernel of the rollout.
"""

from typing import Any

import torch
from torch import nn

_SWITCHES = {"flash": "flash", "efficient": "mem_efficient", "cudnn": "cudnn", "math": "math"}
"""Kernels of scaled_dot_product_attention, as diffusers names them -> as torch does."""


def attention_kernels(attention: str | None, dispatched: bool) -> tuple[str, ...]:
    """The kernels that torch may choose from while a policy is loaded on a GPU.

    cuDNN's is left out unless it is asked for: its backward pass has known faults, among them a gradient of NaN for the queries where there
    is a mask (https://github.com/pytorch/pytorch/issues/196678), and from torch 2.11 on it is the first choice on Hopper, where a forward
    and backward pass of FLUX.1-dev's shape ends in an execution error (`python -m benchmarks break attention flux cudnn+math`). A kernel
    that is named by "_native_..." is opened by diffusers where its attention layers go by the name; where they call torch themselves, it is
    left alone with "math", which takes what it cannot (float32, the wide head of an autoencoder).

    Args:
        attention: as in `FlowMatchingPolicy.from_pretrained`
        dispatched: whether the network's attention layers go by the name

    Raises:
        ValueError: a name that the layers of this network cannot go by.
    """
    backend = None if attention is None else attention.lower()  # as diffusers reads it
    if backend == "native":
        return tuple(_SWITCHES)
    if backend is None or dispatched:
        return tuple(name for name in _SWITCHES if name != "cudnn")
    prefix, kernel = backend[: len("_native_")], backend[len("_native_") :]
    if prefix != "_native_" or kernel not in _SWITCHES:
        known = ", ".join(f'"_native_{name}"' for name in _SWITCHES)
        raise ValueError(
            f'attention must be null, "native" or one of {known} for a network whose layers call torch themselves; got {attention!r}'
        )
    return tuple(name for name in _SWITCHES if name in (kernel, "math"))


def set_attention(network: Any, attention: str | None, device: torch.device) -> None:
    """Give the network's layers their backend, and on a GPU torch its kernels. The policy that is loaded last decides for all.

    Args:
        network: of diffusers
        attention: as in `FlowMatchingPolicy.from_pretrained`
        device: where the network computes

    Raises:
        ValueError: an unknown name, or one that the layers of this network cannot go by.
    """
    kernels = attention_kernels(attention, _dispatched(network))
    if attention is not None:
        network.set_attention_backend(attention)
    if device.type == "cuda":
        for name, switch in _SWITCHES.items():
            getattr(torch.backends.cuda, f"enable_{switch}_sdp")(name in kernels)


def keep_float32(device: torch.device) -> None:
    """Turn TF32 off in cuDNN's convolutions, unless the user has allowed it in matrix products.

    It is torch's default in convolutions alone, and keeps 10 bits of 23 of each factor. Who asks for float32 gets float32. (On the embedded
    pipeline and an H100 it made no difference to a replay.)

    Args:
        device: where the network computes; nothing changes unless it is a GPU
    """
    if device.type == "cuda" and not _tf32_is_allowed():
        torch.backends.cudnn.allow_tf32 = False


def enabled_kernels() -> list[str]:
    """The attention kernels that torch may take now."""
    return [name for name, switch in _SWITCHES.items() if getattr(torch.backends.cuda, f"{switch}_sdp_enabled")()]


def tf32() -> dict[str, bool]:
    """Where a GPU may round float32 to TF32 now."""
    backends: Any = torch.backends
    if hasattr(backends.cudnn, "conv"):  # torch refuses to read the older switches once somebody has used the newer ones
        precisions = {"products": backends.cuda.matmul.fp32_precision, "convolutions": backends.cudnn.conv.fp32_precision}
        return {name: precision == "tf32" for name, precision in precisions.items()}
    return {"products": backends.cuda.matmul.allow_tf32, "convolutions": backends.cudnn.allow_tf32}


def _tf32_is_allowed() -> bool:
    """Whether torch.set_float32_matmul_precision, TORCH_ALLOW_TF32_CUBLAS_OVERRIDE or a switch of torch.backends says so."""
    return tf32()["products"]


def _dispatched(network: nn.Module) -> bool:
    """Whether attention goes through diffusers' dispatch, as in FLUX; the layers of Stable Diffusion and Sana call torch themselves."""
    return any(hasattr(getattr(module, "processor", None), "_attention_backend") for module in network.modules())
