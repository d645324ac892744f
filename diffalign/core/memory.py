"""Memory of an accelerator: what is used, what is free, and the peak of a stage."""

import functools
from typing import Protocol

import attrs
import torch


class DeviceMemory(Protocol):
    """Memory of a device as one process sees it, in bytes."""

    def begin(self) -> None:
        """Begin to look for a new peak."""
        ...

    def used(self) -> int:
        """Bytes of all tensors."""
        ...

    def peak(self) -> int:
        """Largest number of bytes in use since `begin`."""
        ...

    def free(self) -> int:
        """Bytes that new tensors can take, with those that the process holds and does not use."""
        ...


@attrs.define
class CudaMemory:
    """Memory of a CUDA device, from the counters of torch's allocator. The device is not waited for.

    Args:
        device: number of the device
        largest: largest number of bytes in use before the last `begin`
    """

    device: int
    largest: int = 0

    def begin(self) -> None:
        self.largest = self.highest()
        torch.cuda.reset_peak_memory_stats(self.device)

    def used(self) -> int:
        return int(torch.cuda.memory_allocated(self.device))

    def peak(self) -> int:
        return int(torch.cuda.max_memory_allocated(self.device))

    def highest(self) -> int:
        """Largest number of bytes in use since the process began."""
        return max(self.largest, self.peak())

    def free(self) -> int:
        free, _ = torch.cuda.mem_get_info(self.device)
        return int(free + torch.cuda.memory_reserved(self.device)) - self.used()


def current_memory() -> CudaMemory | None:
    """Memory of the current CUDA device; None where there is none."""
    return _memory(torch.cuda.current_device()) if torch.cuda.is_available() else None


@functools.cache
def _memory(device: int) -> CudaMemory:
    return CudaMemory(device)


@attrs.frozen
class Usage:
    """Memory of a stage, in bytes.

    Args:
        before: bytes in use when the stage began
        free: bytes that could still be taken then
        peak: largest number of bytes in use during the stage
        rows: rows of the largest network call up to the end of the stage; 0 if the stage has no network calls
    """

    before: int
    free: int
    peak: int
    rows: int = 0

    @property
    def grown(self) -> int:
        """Bytes that the stage took on top."""
        return self.peak - self.before
