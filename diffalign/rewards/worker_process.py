"""Process of a `WorkerReward`: starting, asking, watching and ending it."""

import collections
import os
import shutil
import signal
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs

from diffalign.core import RewardError
from diffalign.threads import of_child

from .worker_program import read_frame, write_frame

_PROGRAM = Path(__file__).with_name("worker_program.py")
_LONGEST_ANSWER = 2**26
_LINES, _CHARACTERS = 30, 4000
_PATIENCE = 5.0
"""Seconds that a process gets to end by itself, after its pipe has closed or it was told to end."""


def _nothing() -> None:
    """Do nothing; used while there is no process to end."""


@attrs.define(eq=False)
class WorkerProcess:
    """One process that scores. Only one thread may use it at a time.

    Args:
        python: the interpreter
        words: arguments of the program
        environment: variables beside those of this process; if neither sets OMP_NUM_THREADS, the process gets a fair number
        start_timeout: seconds until it is ready
        timeout: seconds for one question
        beside: other processes that compute at the same time, and take their share of the cores
    """

    python: str
    words: Sequence[str]
    environment: Mapping[str, str]
    start_timeout: float
    timeout: float
    beside: int = 0
    _running: subprocess.Popen[bytes] | None = attrs.field(default=None, init=False)
    _printed: collections.deque[str] = attrs.field(factory=lambda: collections.deque(maxlen=_LINES), init=False)
    _drainer: threading.Thread | None = attrs.field(default=None, init=False)
    _end: Callable[[], object] = attrs.field(default=_nothing, init=False)
    _asked: int = attrs.field(default=0, init=False)

    def start(self) -> None:
        """Start the process and wait until the reward is built.

        Raises:
            ValueError: there is no such interpreter.
            RewardError: the process ended, was late, or could not build the reward.
        """
        if shutil.which(self.python) is None:
            raise ValueError(f"WorkerReward.python must be an executable Python; got {self.python!r}")
        self._printed.clear()
        process = subprocess.Popen(
            [self.python, str(_PROGRAM), *self.words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env=of_child({**os.environ, **self.environment}, self.beside),
            start_new_session=True,  # so that it is ended with all its children, and Ctrl-C reaches only this process
        )
        self._running = process
        self._drainer = threading.Thread(target=_drain, args=(process.stderr, self._printed), daemon=True)
        self._drainer.start()
        self._end = weakref.finalize(self, _stop, process)
        with self._watched(process, self.start_timeout, "was not ready"):
            answer = read_frame(process.stdout, _LONGEST_ANSWER)  # type: ignore[arg-type]
        if answer != {"ready": True}:
            _waited(process)
            self.stop()
            what = answer.get("error") if isinstance(answer, dict) else answer
            raise RewardError(f"WorkerReward: {self.words[0]} cannot be built by {self.python}: {what}{self._tail()}")

    def ask(self, question: Mapping[str, Any], payload: Any) -> list[float | None]:
        """Send a question and the numbers that belong to it, and return the scores, None where there is none. Starts a missing process.

        Raises:
            MemoryError: the reward's memory ran out; the process continues.
            RewardError: any other failure.
        """
        if self._running is not None and _has_ended(self._running):  # since the last call
            _waited(self._running)
            self.stop()
        if self._running is None:
            self.start()
        process = self._running
        if process is None or process.stdin is None or process.stdout is None:
            raise RewardError("WorkerReward: the process has no pipe")
        self._asked += 1
        with self._watched(process, self.timeout, "gave no scores"):
            write_frame(process.stdin, {**question, "id": self._asked}, payload)  # type: ignore[arg-type]
            answer = read_frame(process.stdout, _LONGEST_ANSWER)  # type: ignore[arg-type]
            if not _fits(answer, self._asked):
                raise ValueError(f"the answer does not belong to this question: {str(answer)[:80]!r}")
        if answer.get("memory"):
            raise MemoryError(f"in the worker: {answer['error']}")
        if "error" in answer:
            raise RewardError(f"WorkerReward: {self.words[0]} raised {answer['error']}{self._tail()}")
        scores: list[float | None] = answer["scores"]
        return scores

    def stop(self) -> None:
        """End the process and everything that it has started."""
        if self._running is not None:
            self._end()
            self._running = None

    @contextmanager
    def _watched(self, process: subprocess.Popen[bytes], seconds: float, what: str) -> Iterator[None]:
        """Turn a broken pipe into an error that names the cause, and end a process that takes too long."""
        late = threading.Event()
        watch = threading.Timer(seconds, _after(late, process))  # when the process ends, every read and write on its pipes ends
        watch.daemon = True
        watch.start()
        try:
            yield
        except (EOFError, OSError, ValueError) as error:
            watch.cancel()
            ended = _waited(process)
            self.stop()
            if late.is_set():
                raise RewardError(f"WorkerReward: {self.words[0]} {what} within {seconds:g} s{self._tail()}") from error
            if ended is not None and isinstance(error, EOFError | OSError):
                raise RewardError(f"WorkerReward: the process of {self.words[0]} {_cause(ended)}{self._tail()}") from error
            raise RewardError(f"WorkerReward: the process of {self.words[0]} broke the protocol: {error}{self._tail()}") from error
        except BaseException:  # after an interrupt, the rest of this message would be read as the next answer
            self.stop()
            raise
        finally:
            watch.cancel()

    def _tail(self) -> str:
        if self._running is None and self._drainer is not None:
            self._drainer.join(1.0)  # its last lines may not have arrived yet
        lines = [line for line in list(self._printed) if line.strip()]
        return f". It printed last:\n{''.join(lines).rstrip()[-_CHARACTERS:]}" if lines else ""


def _fits(answer: Any, asked: int) -> bool:
    if not isinstance(answer, dict) or answer.get("id") != asked:
        return False
    scores = answer.get("scores")
    return isinstance(answer.get("error"), str) or (isinstance(scores, list) and all(isinstance(score, float | None) for score in scores))


def _after(late: threading.Event, process: subprocess.Popen[bytes]) -> Callable[[], None]:
    def end() -> None:
        late.set()
        _kill(process)

    return end


def _drain(stream: Any, lines: collections.deque[str]) -> None:
    """Read stderr and keep the last lines. A process whose stderr nobody reads would block."""
    with stream:
        while line := stream.readline(4096):
            lines.append(line.decode("utf-8", "replace"))


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and its whole session. Its process id is not given to another process until somebody has waited for it."""
    if process.poll() is None:
        _kill_session(process)


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except OSError:  # no process of the session is left
        return


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """True if the process has ended. Its process id stays valid until somebody has waited for it."""
    return process.returncode is not None or os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def _waited(process: subprocess.Popen[bytes]) -> int | None:
    """Wait for the exit code; None if the process does not end by itself. Its children are killed while its process id is still valid."""
    until = time.monotonic() + _PATIENCE
    while not _has_ended(process):
        if time.monotonic() > until:
            return None
        time.sleep(0.01)
    if process.returncode is None:
        _kill_session(process)
    return process.wait()


def _stop(process: subprocess.Popen[bytes]) -> None:
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
    _kill(process)
    process.wait()


def _cause(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = "; perhaps the machine ran out of memory" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"
