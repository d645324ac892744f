"""Recording of the kernels of a piece of work, so that they can be started again all at once."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Recorder(ABC):
    """Recording of work on a device."""

    @abstractmethod
    def works_on(self, device: torch.device) -> bool:
        """True for a device whose work can be recorded here and now."""

    @abstractmethod
    def timed(self, work: Callable[[], Tensor]) -> tuple[Tensor, float, float]:
        """Work, and wait until the device has done it.

        Returns:
            The result, the share of the seconds in which the host was still starting kernels, and the share of the device's memory that is
            held afterwards and was not before.
        """

    @abstractmethod
    def warm(self, work: Callable[[], object]) -> None:
        """Work once where recordings are made, so that nothing is made there for the first time while one runs."""

    @abstractmethod
    def record(self, work: Callable[[], Any], pool: object) -> tuple[Any, Callable[[], None]]:
        """Record the work.

        Args:
            work: must not wait for the device, and must read nothing but tensors whose memory stays where it is
            pool: memory of the recording

        Returns:
            The tensors that the work gave, and a function that computes them again, into the same memory.

        Raises:
            RuntimeError: the work cannot be recorded.
        """

    @abstractmethod
    def pool(self) -> object:
        """Make memory for recordings. Those that share it overwrite what the others have left there, except what their works gave."""


class CudaRecorder(Recorder):
    """CUDA graphs of the current device."""

    def works_on(self, device: torch.device) -> bool:
        return device.type == "cuda" and device.index == torch.cuda.current_device()

    def timed(self, work: Callable[[], Tensor]) -> tuple[Tensor, float, float]:
        torch.cuda.synchronize()
        before, begin = torch.cuda.memory_allocated(), time.perf_counter()
        result = work()
        started = time.perf_counter()
        torch.cuda.synchronize()
        done = time.perf_counter()
        held = (torch.cuda.memory_allocated() - before) / torch.cuda.mem_get_info()[1]
        return result, (started - begin) / (done - begin), held

    def warm(self, work: Callable[[], object]) -> None:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            work()
        torch.cuda.current_stream().wait_stream(aside)

    def record(self, work: Callable[[], Any], pool: Any) -> tuple[Any, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        before = torch.cuda.stream(torch.cuda.current_stream())  # a recording that fails leaves its own stream behind
        with before, torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # other threads may use the device meanwhile
            result = work()
        return result, graph.replay

    def pool(self) -> Any:
        return torch.cuda.graph_pool_handle()
