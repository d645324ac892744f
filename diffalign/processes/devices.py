"""The processes of a run: torch.distributed behind the loop's five verbs, set up by accelerate."""

import gc
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..core import Devices, ProcessError, SingleProcess

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@attrs.define(eq=False)
class TorchDevices:
    """The processes that torchrun or `accelerate launch` has started.

    Every verb is called by all processes in the same order. Values come back on the device on which they were given.

    Args:
        rank: of this process
        size: how many there are
        device: where collectives run
        backend: gloo, nccl, ...
        moved: bytes that this process has given to collectives, by verb
    """

    rank: int
    size: int
    device: torch.device
    backend: str
    moved: dict[str, int] = attrs.field(factory=dict, init=False)
    _mesh: "DeviceMesh | None" = attrs.field(default=None, init=False)

    def mesh(self) -> "DeviceMesh":
        """All processes in a row, as `fully_shard` takes them: one mesh for the whole run, on the kind of device of `device`."""
        from torch.distributed.device_mesh import init_device_mesh

        if self._mesh is None:
            self._mesh = init_device_mesh(self.device.type, (self.size,))
        return self._mesh

    def release(self) -> None:
        """Let go of the group of processes, after the last collective. Whatever was spread over them cannot be called any more.

        DTensor remembers meshes in caches that live as long as the interpreter, and a mesh holds its group.
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
        """Rows of all processes, in order of rank; each may have another number of them."""
        counts = self._gather("gather", torch.tensor([len(values)]))
        rows = [int(count) for count in counts]
        padded = values.new_zeros(max(rows), *values.shape[1:])
        padded[: len(values)] = values
        return torch.cat([part[:count] for part, count in zip(self._gather("gather", padded), rows, strict=True)])

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace each gradient by its sum over processes, in one collective per type of number.

        A parameter that has a gradient in no process keeps none: an optimizer passes over it, as in one process.
        """
        known = self._reduce("sum_gradients", torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8), dist.ReduceOp.MAX)
        active = [parameter for parameter, there in zip(parameters, known.tolist(), strict=True) if there]
        for parameter in active:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for dtype in sorted({parameter.dtype for parameter in active}, key=str):
            gradients = [p.grad for p in active if p.dtype == dtype and p.grad is not None]
            total = self._reduce("sum_gradients", torch.cat([gradient.flatten() for gradient in gradients]), dist.ReduceOp.SUM)
            for gradient, part in zip(gradients, total.split([gradient.numel() for gradient in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def barrier(self) -> None:
        """Wait for all."""
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
                f"process {self.rank} of {self.size} lost contact with another one in {verb!r}, which has ended or hangs; look for its "
                f"message, and go on by --resume. ({str(error).splitlines()[0]})"
            ) from error


def launched_processes() -> int:
    """How many processes a launcher has started: WORLD_SIZE, as torchrun and `accelerate launch` set it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def connect() -> Devices:
    """Join the processes of the launcher; alone, without one.

    Each takes the accelerator of its local rank, or the CPU with gloo where there is none. Call it before anything is built.
    """
    if launched_processes() < 2:
        return SingleProcess()
    from accelerate.state import PartialState

    # its functions have the group of processes as a default argument: imported once there is one, they would keep it for good
    importlib.import_module("torch.distributed.nn.functional")
    state: Any = PartialState(cpu=not torch.accelerator.is_available())
    return TorchDevices(state.process_index, state.num_processes, state.device, str(dist.get_backend()))


def disconnect(devices: Devices) -> None:
    """Leave the group, if this process is in one, and end its threads.

    They end with the last reference to the group. If they lived on, a thread that lets go of a tensor while the interpreter ends would
    abort the process ("terminate called without an active exception").

    Args:
        devices: as `connect` found them
    """
    if not isinstance(devices, TorchDevices) or not dist.is_initialized():
        return
    devices.release()
    dist.destroy_process_group()
    if sys.exception() is None:  # one that is on its way keeps all that it has met, and must be told before a launcher ends this process
        gc.collect()  # sharded modules refer to the group, and to themselves


def described(devices: Devices, prompts_per_step: int) -> str:
    """How many processes are really in force, and what each does; nothing where no launcher was used.

    Args:
        devices: as `connect` found them
        prompts_per_step: prompt groups of a step
    """
    if not isinstance(devices, TorchDevices):
        launched = "ACCELERATE_MIXED_PRECISION" in os.environ  # on a CPU it starts one process, whatever --num_processes says
        return "1 process, whatever accelerate launch was told; on a CPU use torchrun" if launched else ""
    least, more = divmod(prompts_per_step, devices.size)
    share = f"{least} prompt groups each" if not more else f"{least} or {least + 1} prompt groups each, so some wait"
    return f"{devices.size} processes ({devices.backend}, {devices.device.type}), {share}"
