"""The processes of a run: what the loop asks of them, and errors that stop all of them together."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import attrs
import torch
from torch import Tensor, nn

from .errors import BrokenCallError, ContractError, NonFiniteError, PeerFailed, ProcessError, RewardError
from .host_weights import HostWeights
from .policy import Policy


class Devices(Protocol):
    """The processes of a run, as five verbs. The single-process default does nothing."""

    @property
    def rank(self) -> int:
        """Which process this is."""
        ...

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    def sum(self, values: Tensor) -> Tensor:
        """Sum over processes."""
        ...

    def maximum(self, values: Tensor) -> Tensor:
        """Maximum over processes."""
        ...

    def gather(self, values: Tensor) -> Tensor:
        """Rows of all processes, in order of rank."""
        ...

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace each gradient by its sum over processes: losses are already means over the global number of groups."""
        ...

    def barrier(self) -> None:
        """Wait for all."""
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
    """Keeps the network calls of all processes in step, where a call itself is a collective because weights are sharded."""

    def backward(self, loss: Tensor) -> None:
        """Back-propagate together with the other processes."""
        ...

    def finish(self, failed: bool) -> None:
        """The end of a stage: make the calls that other processes still make, with rows of weight zero.

        Args:
            failed: this process has left the stage by an error; the others are told at their next call
        """
        ...


@attrs.frozen
class Free:
    """`Lockstep` where every process has all weights: nothing has to be kept in step."""

    def backward(self, loss: Tensor) -> None:
        torch.autograd.backward(loss)

    def finish(self, failed: bool) -> None:
        pass


class Sharding(Protocol):
    """Spreads weights over the processes of a run.

    A policy that is loaded for it leaves its network on the host, and tells `host`.
    """

    @property
    def host(self) -> HostWeights:
        """The weights that wait for `shard`."""
        ...

    def shard(self, policies: Mapping[str, Policy], devices: Devices) -> Lockstep:
        """Shard what the policies share, after the last fork and before optimizers are made."""
        ...


_KINDS: tuple[type[Exception], ...] = (
    RuntimeError,
    ProcessError,
    ValueError,
    ContractError,
    RewardError,
    NonFiniteError,
    torch.OutOfMemoryError,
)
"""In the order of precedence: where processes fail differently, the last one of these is what stops the step."""


def gather_texts(devices: Devices, text: str) -> list[str]:
    """The texts of all processes, in order of rank."""
    content = torch.tensor(list(text.encode()), dtype=torch.uint8)
    width = int(devices.maximum(torch.tensor(len(content))))
    padded = torch.zeros(1, width + 1, dtype=torch.uint8)
    padded[0, : len(content)] = content
    return [bytes(row.tolist()).rstrip(b"\0").decode() for row in devices.gather(padded)]


def agree(devices: Devices, error: Exception | None) -> None:
    """A point that all processes reach: if one of them has failed, all raise.

    Args:
        devices: the processes
        error: of this one, None where all is well

    Raises:
        Exception: `error` itself, or one of the same kind that names the process that failed and repeats what it said. One that came in
            the middle of a collective is raised at once, because nobody listens: the end of this process is what the others notice.
    """
    if isinstance(error, BrokenCallError):
        raise error
    if devices.size > 1:
        kinds = devices.gather(torch.tensor([_kind(error)])).tolist()
        if worst := max(kinds):
            texts = gather_texts(devices, str(error or ""))
            rank = kinds.index(worst)
            if error is None or isinstance(error, PeerFailed):
                raise _KINDS[worst - 1](f"process {rank} of {devices.size}: {texts[rank]}")
    if error is not None:
        raise error


def _kind(error: Exception | None) -> int:
    """0 for what is no failure of this process, else 1 + its place among the kinds."""
    if error is None or isinstance(error, PeerFailed):
        return 0
    return 1 + max((place for place, known in enumerate(_KINDS) if isinstance(error, known)), default=0)


@contextmanager
def together(devices: Devices, lockstep: Lockstep) -> Iterator[None]:
    """A block without collectives but those of `lockstep`; if it fails in one process, all processes raise at its end."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    if devices.size > 1 and not isinstance(error, BrokenCallError):
        lockstep.finish(failed=error is not None)
    agree(devices, error)
