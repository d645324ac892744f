"""Ctrl-C and SIGTERM, honoured between steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import attrs


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop and has stopped between two steps, so weights and optimizers fit together. The text names the signal.

    A plain KeyboardInterrupt means a second signal, which ends the run at once.
    """


@attrs.define
class StopRequest:
    """A request to stop, as signals deliver it."""

    received: signal.Signals | None = None

    @property
    def number(self) -> int:
        """Number of the signal; 0 while none came."""
        return 0 if self.received is None else int(self.received)


@contextmanager
def stop_between_steps() -> Iterator[StopRequest]:
    """Delay the first SIGINT or SIGTERM to the end of the step, so that weights and optimizers fit together. The second acts at once."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if request.received is not None:
            raise KeyboardInterrupt
        request.received = signal.Signals(number)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
