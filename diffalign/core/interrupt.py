"""Ctrl-C and SIGTERM, honoured between steps."""

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

import attrs
import torch

from .processes import Devices

_STDERR = 2


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, and has stopped between two steps: what it holds fits together. Its text names the signal.

    A plain KeyboardInterrupt is a second signal, that did not wait: weights and optimizers are those of the last finished step, but
    what was drawn or observed in the step under way is not taken back.
    """


@attrs.define
class StopRequest:
    """A request to stop, as signals deliver it.

    Args:
        received: the first signal
        step: the number of the step under way, from 1; None where none is
        speaks: whether this process answers the user
    """

    received: signal.Signals | None = None
    step: int | None = None
    speaks: bool = True
    _held: bool = attrs.field(default=False, init=False)

    @property
    def number(self) -> int:
        """Number of the signal; 0 while none came."""
        return 0 if self.received is None else int(self.received)

    def hold(self) -> None:
        """Weights begin to move: from here to `release` a further signal waits, too, so that they never stop half-way."""
        self._held = True

    def release(self) -> None:
        """What began to move fits together again."""
        self._held = False

    def take(self, number: int) -> None:
        """A signal came.

        Raises:
            KeyboardInterrupt: the second, while nothing moves.
        """
        if self.received is None:
            self.received = signal.Signals(number)
            if self.speaks:  # not by print: the signal may have come in the midst of one
                os.write(_STDERR, f"{self._answer()}\n".encode())
        elif not self._held:
            raise KeyboardInterrupt

    def honour(self, devices: Devices) -> None:
        """Stop all processes after the same step, whoever was asked.

        Raises:
            Interrupted: one was.
        """
        asked = int(devices.maximum(torch.tensor(self.number)))
        if asked:
            raise Interrupted(signal.Signals(asked).name)

    def _answer(self) -> str:
        if self.step is None:
            return "stopping before the next step; again: stop now"
        return f"finishing step {self.step}; again: stop now, without saving that step"


@contextmanager
def stop_between_steps(speaks: bool = True) -> Iterator[StopRequest]:
    """Let the first SIGINT or SIGTERM wait for the end of the step, so that weights and optimizers fit together; the second interrupts.

    Args:
        speaks: say at once what was understood; one process of a run does
    """
    request = StopRequest(speaks=speaks)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(number: int, frame: FrameType | None) -> None:
        request.take(number)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Ends(Protocol):
    """A hook, as far as its end goes."""

    def stop(self, loop: Any, step: int, error: BaseException | None) -> None: ...


def end_all(hooks: Iterable[_Ends], loop: object, step: int, error: BaseException | None) -> None:
    """Tell every hook of the end of a run; the first that fails is heard of when all have.

    Args:
        hooks: in their order
        loop: that has ended
        step: steps done
        error: by which it ended; it gets a note where a hook fails as well
    """
    failed: Exception | None = None
    for hook in hooks:
        try:
            hook.stop(loop, step, error)
        except Exception as caught:
            failed = failed or caught
    if failed is not None and error is None:
        raise failed
    if failed is not None and error is not None:
        error.add_note(f"then, while stopping: {type(failed).__name__}: {failed}")
