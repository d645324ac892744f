"""Where matrix products in half precision are worth taking."""

import functools
import platform
import sys

import torch


def multiplied_in(compute: torch.dtype | None, device: torch.device) -> torch.dtype | None:
    """The type in which float32 weights are multiplied on a device; None is their own.

    A CPU without units for bfloat16 converts each operand there and back: the embedded pipeline then takes 2 (AVX512) to 4.5 times (AVX2)
    as long as in float32, so it computes in float32, and says so once.

    Args:
        compute: what was asked for
        device: where the network computes
    """
    if compute is not torch.bfloat16 or device.type != "cpu" or cpu_has_bfloat16():
        return compute
    say_float32()
    return None


@functools.cache
def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies in bfloat16 (AMX, AVX512-BF16, Arm's BF16), and does not only store it. Where torch cannot tell: no."""
    if platform.machine().lower() in ("aarch64", "arm64"):
        ask = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # on x86 it says yes to any AVX512
        return ask is not None and bool(ask())
    asked = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(bool(ask()) for ask in asked if ask is not None)


@functools.cache
def say_float32() -> None:
    """One line on stderr, once a process."""
    print(
        "compute: bfloat16 was asked for, and this CPU has no units for products in bfloat16 (AMX, AVX512-BF16): the policy computes in "
        "float32, which is faster here",
        file=sys.stderr,
        flush=True,
    )
