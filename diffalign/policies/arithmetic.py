"""Arithmetic of a GPU: the attention kernels that torch may use, and rounding to TF32 in convolutions.

Both are switches of the process. A context around the network's forward pass is not enough: activation checkpointing calls the network
again in the backward pass, outside that context, and a replay must use the kernel of the rollout.
"""

from typing import Any

import torch
from torch import nn

_SWITCHES = {"flash": "flash", "efficient": "mem_efficient", "cudnn": "cudnn", "math": "math"}
"""Kernels of scaled_dot_product_attention: diffusers' name -> torch's name."""


def attention_kernels(attention: str | None, dispatched: bool) -> tuple[str, ...]:
    """Kernels from which torch may choose while a policy is loaded on a GPU.

    cuDNN's kernel is left out unless it is asked for, because its backward pass has known faults. One is a NaN gradient of the queries
    with a mask (https://github.com/pytorch/pytorch/issues/196678). From torch 2.11 on it is the first choice on Hopper, where a forward and
    backward pass of FLUX.1-dev's shape ends in an execution error (`python -m benchmarks break attention flux cudnn+math`). For a name
    "_native_...", diffusers selects the kernel if its attention layers use the name. If they call torch directly, only this kernel and
    "math" stay on; "math" computes what the kernel cannot (float32, the wide head of an autoencoder).

    Args:
        attention: name as in `FlowMatchingPolicy.from_pretrained`
        dispatched: whether the network's attention layers use the name

    Raises:
        ValueError: the layers of this network cannot use the name.
    """
    backend = None if attention is None else attention.lower()  # diffusers ignores case too
    if backend == "native":
        return tuple(_SWITCHES)
    if backend is None or dispatched:
        return tuple(name for name in _SWITCHES if name != "cudnn")
    prefix, kernel = backend[: len("_native_")], backend[len("_native_") :]
    if prefix != "_native_" or kernel not in _SWITCHES:
        known = ", ".join(f'"_native_{name}"' for name in _SWITCHES)
        raise ValueError(
            f'attention must be null, "native" or one of {known} for a network whose layers call torch directly; got {attention!r}'
        )
    return tuple(name for name in _SWITCHES if name in (kernel, "math"))


def set_attention(network: Any, attention: str | None, device: torch.device) -> None:
    """Set the attention backend of the network's layers, and on a GPU torch's kernels. The policy that is loaded last decides for all.

    Args:
        network: network of diffusers
        attention: name as in `FlowMatchingPolicy.from_pretrained`
        device: device of the network

    Raises:
        ValueError: the name is unknown, or the layers of this network cannot use it.
    """
    kernels = attention_kernels(attention, _dispatched(network))
    if attention is not None:
        network.set_attention_backend(attention)
    if device.type == "cuda":
        for name, switch in _SWITCHES.items():
            getattr(torch.backends.cuda, f"enable_{switch}_sdp")(name in kernels)


def keep_float32(device: torch.device) -> None:
    """Turn TF32 off in cuDNN's convolutions, unless the user has allowed it in matrix products.

    TF32 keeps 10 of the 23 bits of each factor. Torch uses it by default only in convolutions. A user who asks for float32 should get
    float32. (On the embedded pipeline and an H100 it made no difference to a replay.)

    Args:
        device: device of the network; nothing changes unless it is a GPU
    """
    if device.type == "cuda" and not _tf32_is_allowed():
        torch.backends.cudnn.allow_tf32 = False


def enabled_kernels() -> list[str]:
    """Attention kernels that torch may use now."""
    return [name for name, switch in _SWITCHES.items() if getattr(torch.backends.cuda, f"{switch}_sdp_enabled")()]


def tf32() -> dict[str, bool]:
    """Operations in which a GPU may round float32 to TF32 now: name -> allowed."""
    backends: Any = torch.backends
    if hasattr(backends.cudnn, "conv"):  # torch refuses to read the old switches once the new ones have been used
        precisions = {"products": backends.cuda.matmul.fp32_precision, "convolutions": backends.cudnn.conv.fp32_precision}
        return {name: precision == "tf32" for name, precision in precisions.items()}
    return {"products": backends.cuda.matmul.allow_tf32, "convolutions": backends.cudnn.allow_tf32}


def _tf32_is_allowed() -> bool:
    """True if torch.set_float32_matmul_precision, TORCH_ALLOW_TF32_CUBLAS_OVERRIDE or a switch of torch.backends allows TF32."""
    return tf32()["products"]


def _dispatched(network: nn.Module) -> bool:
    """True if attention uses diffusers' dispatch, as in FLUX. The layers of Stable Diffusion and Sana call torch directly."""
    return any(hasattr(getattr(module, "processor", None), "_attention_backend") for module in network.modules())
