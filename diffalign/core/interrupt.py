"""Ctrl-C and SIGTERM, honoured between steps."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import attrs
import torch

from .processes import Devices

_STDERR = 2


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop and has stopped between two steps, so weights and optimizers fit together. The text names the signal.

    A plain KeyboardInterrupt means a second signal, which ends the run at once: weights and optimizers are those of the last finished
    step, but draws and observations of the current step are not taken back.
    """


@attrs.define
class StopRequest:
    """Request to stop, delivered by signals.

    Args:
        received: the first signal
        step: number of the current step, from 1; None between steps
        speaks: whether this process answers the user
        moving: whether weights have begun to move since the last finished step, so that an error leaves them half-way
    """

    received: signal.Signals | None = None
    step: int | None = None
    speaks: bool = True
    moving: bool = attrs.field(default=False, init=False)
    _held: bool = attrs.field(default=False, init=False)

    @property
    def number(self) -> int:
        """Number of the signal; 0 while none came."""
        return 0 if self.received is None else int(self.received)

    def hold(self) -> None:
        """Let a second signal wait as well, until `release`: weights begin to move and must not stop half-way."""
        self._held = self.moving = True

    def release(self) -> None:
        """End a step, finished or not: a second signal acts at once again."""
        self._held, self.step = False, None

    def finish(self) -> None:
        """End a finished step: weights and optimizers fit together again."""
        self.release()
        self.moving = False

    def take(self, number: int) -> None:
        """Receive a signal.

        Raises:
            KeyboardInterrupt: it is the second signal, and no weight moves.
        """
        if self.received is None:
            self.received = signal.Signals(number)
            if self.speaks:  # not by print: the signal may have come in the midst of one
                os.write(_STDERR, f"{self._answer()}\n".encode())
        elif not self._held:
            raise KeyboardInterrupt

    def ask(self) -> None:
        """Ask the run to stop, as the first signal does, without a word."""
        self.received = self.received or signal.SIGINT

    def honour(self, devices: Devices) -> None:
        """Stop all processes after the same step, whichever of them received the signal.

        Raises:
            Interrupted: a process received one.
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
    """Delay the first SIGINT or SIGTERM to the end of the step, so that weights and optimizers fit together. The second acts at once.

    Args:
        speaks: print at once what the signal does; one process of a run prints
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
