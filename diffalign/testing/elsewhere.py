"""Property that all contracts share: a part does on a second device what it does on the CPU."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from .pretended_device import DEVICE, has_gradients, register, second_device
from .properties import NotApplicableError, Property, holds

Part = TypeVar("Part")

_LACKING = ("which the pretended device cannot", "invalid python storage")
"""Parts of error messages about memory, which a pretended device does not have: from reading addresses or growing tensors in place."""


def prepare_second_device() -> None:
    """Register the pretended device with torch, if possible. Call it before the first backward pass, so that the device has gradients."""
    _obstacle()


def on_a_second_device(check: Callable[[Part], None], gradients: bool = False) -> Property[Part]:
    """Build the property whose check runs with the pretended device. It is skipped if there can be no such device.

    Args:
        check: compares the part on `DEVICE` with the part on the CPU
        gradients: whether the check takes gradients
    """

    def checked(part: Part) -> None:
        with _elsewhere():
            if gradients and not has_gradients():
                raise NotApplicableError(
                    "a backward pass was made in this process before the pretended device was known; call "
                    "diffalign.testing.prepare_second_device() first, in a conftest.py for instance"
                )
            check(part)

    return Property("a second device", "on a GPU it would fail, or compute on the wrong device", checked)


def _obstacle() -> str:
    """Reason why there can be no pretended device in this process; "" if there can be one."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None and accelerator.type != DEVICE:
        return f"the pretended device would replace {accelerator}; hide that to check it (for NVIDIA's: CUDA_VISIBLE_DEVICES=)"
    try:
        register()
    except RuntimeError as error:
        return str(error)
    return ""


@contextmanager
def _elsewhere() -> Iterator[None]:
    if obstacle := _obstacle():
        raise NotApplicableError(obstacle)
    try:
        with second_device():
            yield
    except Exception as error:  # a reward's error is the cause of another error
        if any(words in str(error) for words in _LACKING):
            raise NotApplicableError(f"it needs more than the pretended device has: {error}") from error
        raise


def copied(part: Part) -> Part:
    """Copy a part, so that the copy can be moved and the original stays as it is."""
    try:
        return copy.deepcopy(part)
    except Exception as error:  # locks, processes and files cannot be copied, and raise many types
        raise NotApplicableError(f"it cannot be copied, and the original must not be moved: {type(error).__name__}: {error}") from error


def agrees(there: Tensor, here: Tensor, what: str, tolerance: float, anywhere: bool = False) -> None:
    """Check that a result on the device equals that on the CPU, and that it lies on the device.

    Args:
        there, here: results on the device and on the CPU
        what: name of the result in the message
        tolerance: largest difference, relative to the largest value
        anywhere: whether the result may lie on the host

    Raises:
        AssertionError: it differs, or lies elsewhere.
    """
    holds(anywhere or there.device.type == DEVICE, f"{what} must be on the policy's device, {DEVICE}:0; got one on {there.device}")
    mine = there.cpu()
    holds(mine.shape == here.shape, f"{what} has shape {tuple(mine.shape)} there, and {tuple(here.shape)} on the CPU")
    if here.numel() == 0:
        return
    gap, scale = float((mine.double() - here.double()).abs().max()), float(here.double().abs().max())
    holds(gap <= tolerance * max(scale, 1e-9), f"{what} differs from that on the CPU by {gap:.3g}; its largest value is {scale:.3g}")
