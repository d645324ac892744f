"""The property that all contracts share: a part does on a second device what it does on the CPU."""

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
"""Of errors about memory, which a pretended device does not have: libraries that read addresses, and tensors that grow in place."""


def prepare_second_device() -> None:
    """Make the pretended device known to torch, where there can be one; before the first backward pass, so that it has gradients."""
    _obstacle()


def on_a_second_device(check: Callable[[Part], None], gradients: bool = False) -> Property[Part]:
    """The property whose check is called within the pretended device; skipped where there can be none.

    Args:
        check: compares the part there, on `DEVICE`, with the part on the CPU
        gradients: whether it takes some
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
    """Why there can be no pretended device in this process; "" where there can."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None and accelerator.type != DEVICE:
        return f"the pretended device would take the place of {accelerator}; hide that to check it (CUDA_VISIBLE_DEVICES= of NVIDIA's)"
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
    except Exception as error:  # a reward's is inside another
        if any(words in str(error) for words in _LACKING):
            raise NotApplicableError(f"it asks for more than the pretended device has: {error}") from error
        raise


def copied(part: Part) -> Part:
    """A copy that may be moved; what was given stays as it is."""
    try:
        return copy.deepcopy(part)
    except Exception as error:  # locks, processes and files cannot be copied, in many words
        raise NotApplicableError(f"it cannot be copied, and is not to be moved itself: {type(error).__name__}: {error}") from error


def agrees(there: Tensor, here: Tensor, what: str, tolerance: float, anywhere: bool = False) -> None:
    """Raise AssertionError unless a result there is that of the CPU, and on the device.

    Args:
        there, here: the two
        what: for the message
        tolerance: largest difference, relative to the largest value
        anywhere: whether it may be on the host
    """
    holds(anywhere or there.device.type == DEVICE, f"{what} must be on the policy's device, {DEVICE}:0; got one on {there.device}")
    mine = there.cpu()
    holds(mine.shape == here.shape, f"{what} has shape {tuple(mine.shape)} there, and {tuple(here.shape)} on the CPU")
    if here.numel() == 0:
        return
    gap, scale = float((mine.double() - here.double()).abs().max()), float(here.double().abs().max())
    holds(gap <= tolerance * max(scale, 1e-9), f"{what} differs from that on the CPU by {gap:.3g}; its largest value is {scale:.3g}")
