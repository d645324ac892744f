"""Processes of a run: the operations that the loop needs, and errors that stop all processes together."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import attrs
import torch
from torch import Tensor, nn

from .errors import (
    BrokenCallError,
    CheckpointError,
    ContractError,
    NonFiniteError,
    NonFiniteRewardError,
    PeerFailed,
    ProcessError,
    RewardError,
    UpdateError,
)
from .host_weights import HostWeights
from .policy import Policy


class Devices(Protocol):
    """Processes of a run, with five collective operations. The default for a single process does nothing."""

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        ...

    @property
    def size(self) -> int:
        """Number of processes."""
        ...

    def sum(self, values: Tensor) -> Tensor:
        """Sum over processes."""
        ...

    def maximum(self, values: Tensor) -> Tensor:
        """Maximum over processes."""
        ...

    def gather(self, values: Tensor) -> Tensor:
        """Collect the rows of all processes, in order of rank."""
        ...

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace each gradient by its sum over processes: losses are already means over the global number of groups."""
        ...

    def barrier(self) -> None:
        """Wait for all processes."""
        ...


@attrs.frozen
class SingleProcess:
    """`Devices` of one process."""

    rank: int = 0
    size: int = 1

    def sum(self, values: Tensor) -> Tensor:
        return values

    def maximum(self, values: Tensor) -> Tensor:
        return values

    def gather(self, values: Tensor) -> Tensor:
        return values

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        pass

    def barrier(self) -> None:
        pass


class Lockstep(Protocol):
    """Keeps the network calls of all processes in step. Sharded weights need this, because there each call is a collective."""

    def backward(self, loss: Tensor) -> None:
        """Back-propagate together with the other processes."""
        ...

    def finish(self, failed: bool) -> None:
        """End a stage: take part in the calls that other processes still make, with rows of weight zero.

        Args:
            failed: this process has left the stage by an error; the other processes are told at their next call
        """
        ...


@attrs.frozen
class Free:
    """`Lockstep` for processes that each have all weights: nothing has to be kept in step."""

    def backward(self, loss: Tensor) -> None:
        torch.autograd.backward(loss)

    def finish(self, failed: bool) -> None:
        pass


class Sharding(Protocol):
    """Shards weights over the processes of a run.

    A policy that is loaded for sharding leaves its network on the host and registers it with `host`.
    """

    @property
    def host(self) -> HostWeights:
        """Weights that wait for `shard`."""
        ...

    def shard(self, policies: Mapping[str, Policy], devices: Devices) -> Lockstep:
        """Shard the networks of all policies, after the last fork and before optimizers are made."""
        ...


_KINDS: tuple[type[Exception], ...] = (
    RuntimeError,
    ProcessError,
    OSError,
    ValueError,
    CheckpointError,
    ContractError,
    RewardError,
    NonFiniteError,
    NonFiniteRewardError,
    torch.OutOfMemoryError,
    UpdateError,
)
"""Kinds of errors, in order of precedence: if processes fail differently, the last of these kinds is raised."""


def gather_texts(devices: Devices, text: str) -> list[str]:
    """Collect the texts of all processes, in order of rank."""
    content = torch.tensor(list(text.encode()), dtype=torch.uint8)
    width = int(devices.maximum(torch.tensor(len(content))))
    padded = torch.zeros(1, width + 1, dtype=torch.uint8)
    padded[0, : len(content)] = content
    return [bytes(row.tolist()).rstrip(b"\0").decode() for row in devices.gather(padded)]


def agree(devices: Devices, error: Exception | None) -> None:
    """Meet all other processes; if one of them has failed, all raise.

    Args:
        devices: the processes
        error: error of this process; None if it has not failed

    Raises:
        Exception: `error` itself; in processes that have not failed, or otherwise than the worst one, an error of its kind that names that
            process and repeats its message. A `BrokenCallError` is raised at once: the others are blocked, and only notice that this
            process ends.
    """
    if isinstance(error, BrokenCallError):
        raise error
    if devices.size > 1:
        kinds = devices.gather(torch.tensor([_kind(error)])).tolist()
        if worst := max(kinds):
            texts = gather_texts(devices, str(error or ""))
            rank = kinds.index(worst)
            if _kind(error) != worst:  # one kind in all processes: memory that ran out is tried again, in all or in none
                raise _KINDS[worst - 1](f"process {rank} of {devices.size}: {texts[rank]}") from error
    if error is not None:
        raise error


def _kind(error: Exception | None) -> int:
    """Place of the error in `_KINDS`, from 1; 0 if this process has not failed."""
    if error is None or isinstance(error, PeerFailed):
        return 0
    return 1 + max((place for place, known in enumerate(_KINDS) if isinstance(error, known)), default=0)


@contextmanager
def together(devices: Devices, lockstep: Lockstep) -> Iterator[None]:
    """Run a block whose only collectives are those of `lockstep`. If it fails in one process, all processes raise at its end."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    if devices.size > 1 and not isinstance(error, BrokenCallError):
        lockstep.finish(failed=error is not None)
    agree(devices, error)
