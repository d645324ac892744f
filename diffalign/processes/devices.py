"""Processes of a run: the collective operations of the loop by torch.distributed, set up by accelerate."""

import gc
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..core import Devices, ProcessError, SingleProcess

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_BUCKET = 2**26
"""Bytes of gradients that are summed at once: a collective needs twice as many beside them."""


@attrs.define(eq=False)
class TorchDevices:
    """Processes that torchrun or `accelerate launch` has started.

    All processes must call the operations in the same order. Results lie on the device of their input.

    Args:
        rank: number of this process, from 0
        size: number of processes
        device: device on which collectives run
        backend: gloo, nccl, ...
        moved: bytes that this process has given to collectives, by operation
    """

    rank: int
    size: int
    device: torch.device
    backend: str
    moved: dict[str, int] = attrs.field(factory=dict, init=False)
    _mesh: "DeviceMesh | None" = attrs.field(default=None, init=False)

    def mesh(self) -> "DeviceMesh":
        """Mesh of all processes in one row, for `fully_shard`: one for the whole run, on the kind of device of `device`."""
        from torch.distributed.device_mesh import init_device_mesh

        if self._mesh is None:
            self._mesh = init_device_mesh(self.device.type, (self.size,))
        return self._mesh

    def release(self) -> None:
        """Drop the references to the process group, after the last collective. Sharded modules cannot be called afterwards.

        They must be dropped because DTensor keeps meshes in caches until the interpreter ends, and a mesh holds its group.
        """
        groups: dict[str, object] = vars(self._mesh).get("_pg_registry", {}) if self._mesh is not None else {}
        groups.clear()
        self._mesh = None

    def sum(self, values: Tensor) -> Tensor:
        """Sum over processes."""
        return self._reduce("sum", values, dist.ReduceOp.SUM)

    def maximum(self, values: Tensor) -> Tensor:
        """Maximum over processes."""
        return self._reduce("maximum", values, dist.ReduceOp.MAX)

    def gather(self, values: Tensor) -> Tensor:
        """Collect the rows of all processes, in order of rank. The number of rows may differ between processes."""
        counts = self._gather("gather", torch.tensor([len(values)]))
        rows = [int(count) for count in counts]
        padded = values.new_zeros(max(rows), *values.shape[1:])
        padded[: len(values)] = values
        return torch.cat([part[:count] for part, count in zip(self._gather("gather", padded), rows, strict=True)])

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace each gradient by its sum over processes, in collectives of about `_BUCKET` bytes of one dtype.

        A parameter without a gradient in any process keeps none, so that an optimizer skips it, as in a single process.
        """
        known = self._reduce("sum_gradients", torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8), dist.ReduceOp.MAX)
        active = [parameter for parameter, there in zip(parameters, known.tolist(), strict=True) if there]
        for parameter in active:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for dtype in sorted({parameter.dtype for parameter in active}, key=str):
            for gradients in _buckets([p.grad for p in active if p.dtype == dtype and p.grad is not None]):
                total = self._reduce("sum_gradients", torch.cat([gradient.flatten() for gradient in gradients]), dist.ReduceOp.SUM)
                for gradient, part in zip(gradients, total.split([gradient.numel() for gradient in gradients]), strict=True):
                    gradient.copy_(part.view_as(gradient))

    def barrier(self) -> None:
        """Wait for all processes."""
        self._together("barrier", dist.barrier)

    def _reduce(self, verb: str, values: Tensor, how: Any) -> Tensor:
        result = values.detach().to(self.device, copy=True)
        self._charge(verb, result)
        self._together(verb, lambda: dist.all_reduce(result, how))
        return result.to(values.device)

    def _gather(self, verb: str, values: Tensor) -> list[Tensor]:
        mine = values.detach().to(self.device).contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        self._charge(verb, mine)
        self._together(verb, lambda: dist.all_gather(parts, mine))
        return [part.to(values.device) for part in parts]

    def _charge(self, verb: str, values: Tensor) -> None:
        self.moved[verb] = self.moved.get(verb, 0) + values.numel() * values.element_size()

    def _together(self, verb: str, collective: Callable[[], object]) -> None:
        try:
            collective()
        except RuntimeError as error:
            raise ProcessError(
                f"process {self.rank} of {self.size} lost contact with another process in {verb!r}: that one has ended or hangs. Look for "
                f"its message, and continue by --resume. ({str(error).splitlines()[0]})"
            ) from error


def launched_processes() -> int:
    """Number of processes that a launcher has started: WORLD_SIZE, which torchrun and `accelerate launch` set."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def connect() -> Devices:
    """Join the processes that a launcher has started; without a launcher, this process is alone.

    Each process takes the accelerator of its local rank; without an accelerator, the CPU with gloo. Call it before anything is built.
    """
    if launched_processes() < 2:
        return SingleProcess()
    from accelerate.state import PartialState

    # functions of this module have the process group as a default argument; imported after the group exists, they would never free it
    importlib.import_module("torch.distributed.nn.functional")
    state: Any = PartialState(cpu=not torch.accelerator.is_available())
    return TorchDevices(state.process_index, state.num_processes, state.device, str(dist.get_backend()))


def disconnect(devices: Devices) -> None:
    """Leave the process group, if this process is in one, and end its threads.

    The threads end with the last reference to the group. If they lived longer, a thread that frees a tensor while the interpreter ends
    would abort the process ("terminate called without an active exception").

    Args:
        devices: the processes that `connect` returned
    """
    if not isinstance(devices, TorchDevices) or not dist.is_initialized():
        return
    devices.release()
    dist.destroy_process_group()
    if sys.exception() is None:  # an error keeps its frames alive, and must be printed before a launcher ends this process
        gc.collect()  # sharded modules refer to the group, and to themselves


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Cut a list of gradients where `_BUCKET` bytes are full. Each piece has at least one."""
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        if bucket and size + gradient.nbytes > _BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.nbytes
    if bucket:
        yield bucket


def described(devices: Devices, prompts_per_step: int) -> str:
    """Describe in one line how many processes take part and what each does; empty without a launcher.

    Args:
        devices: the processes that `connect` returned
        prompts_per_step: prompt groups of a step
    """
    if not isinstance(devices, TorchDevices):
        launched = "ACCELERATE_MIXED_PRECISION" in os.environ  # on a CPU it starts one process, whatever --num_processes says
        return "1 process: on a CPU accelerate launch starts only one; use torchrun for several" if launched else ""
    least, more = divmod(prompts_per_step, devices.size)
    share = f"{least} prompt groups each" if not more else f"{least} or {least + 1} prompt groups each, so some wait"
    return f"{devices.size} processes ({devices.backend}, {devices.device.type}), {share}"
