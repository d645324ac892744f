"""Waits of the host for an accelerator: how often a stage asks for a number that the device has not computed yet."""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import attrs
import torch

EVERY, FIRST = 100, 2
"""Steps between two that are counted, and the first of them, which has neither compilation nor the contract of the first step in it."""
_WAITED = "called a synchronizing CUDA operation"
"""Warning of torch at each wait."""
_SAID = (_WAITED, "Synchronization debug mode is a prototype feature")


class HostWaits(Protocol):
    """Counter of the waits of this process for its device."""

    count: int

    def counting(self) -> AbstractContextManager[None]:
        """Add the waits inside the block to `count`."""
        ...


@attrs.define
class CudaWaits:
    """Counts the operations that make the host wait for CUDA, by what torch warns of (`torch.cuda.set_sync_debug_mode`).

    Other warnings are shown after the block. If the mode is set already, it stays as it is, and nothing is counted.

    Args:
        count: waits so far
    """

    count: int = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        if torch.cuda.get_sync_debug_mode():  # somebody looks for waits already, and wants to see them
            yield
            return
        said: list[warnings.WarningMessage] = []
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.filterwarnings("always", message=_WAITED)
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    yield
                finally:
                    torch.cuda.set_sync_debug_mode("default")
        finally:
            self.count += sum(str(one.message).startswith(_WAITED) for one in said)
            for one in said:
                if not str(one.message).startswith(_SAID):
                    warnings.showwarning(one.message, one.category, one.filename, one.lineno, one.file, one.line)


def waits_at(step: int) -> HostWaits | None:
    """Counter of the waits for the CUDA device of this process at one step of a hundred; None at the others, and without such a device.

    Counting makes Python forget which warnings it has shown already, so it is not done at every step.
    """
    return CudaWaits() if step % EVERY == FIRST and torch.cuda.is_available() else None
