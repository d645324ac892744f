"""Ctrl-C and SIGTERM, honoured between steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import attrs


@attrs.define
class StopRequest:
    """Whether somebody has asked the run to stop."""

    received: signal.Signals | None = None


@contextmanager
def stop_between_steps() -> Iterator[StopRequest]:
    """Let the first SIGINT or SIGTERM wait for the end of the step, so that weights and optimizers fit together; the second interrupts."""
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
