"""Choice of the type for matrix products: half precision only if the device is faster with it."""

import functools
import platform

import torch

from diffalign.core.unessential import say


def multiplied_in(compute: torch.dtype | None, device: torch.device) -> torch.dtype | None:
    """Type in which float32 weights are multiplied on a device; None means float32.

    A CPU without units for bfloat16 converts each operand to it and back: the embedded pipeline then takes 2 (AVX512) to 4.5 times (AVX2)
    as long as in float32. So such a CPU computes in float32, and a line is printed once.

    Args:
        compute: type that the user asked for
        device: device of the network
    """
    if compute is not torch.bfloat16 or device.type != "cpu" or cpu_has_bfloat16():
        return compute
    say_float32()
    return None


@functools.cache
def cpu_has_bfloat16() -> bool:
    """True if the CPU has units that multiply in bfloat16 (AMX, AVX512-BF16, Arm's BF16). False if torch cannot tell."""
    if platform.machine().lower() in ("aarch64", "arm64"):
        ask = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # on x86 it is True for every AVX512
        return ask is not None and bool(ask())
    asked = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(bool(ask()) for ask in asked if ask is not None)


@functools.cache
def say_float32() -> None:
    """Print one line on stderr, once per process."""
    say(
        "compute: bfloat16 was asked for, but this CPU has no units for products in bfloat16 (AMX, AVX512-BF16): the policy computes in "
        "float32, which is faster here"
    )
