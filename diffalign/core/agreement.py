"""Errors that stop all processes together: none is left waiting in a collective for one that has failed."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .errors import BrokenCallError, ContractError, NonFiniteError, ProcessError, RewardError
from .interfaces import Devices, Lockstep

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


class PeerFailed(Exception):  # noqa: N818  it is no error of this process
    """Another process has failed; what it said comes with the next `agree`."""


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
