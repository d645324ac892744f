"""Requests to several servers: they are asked in turn, with pauses, until one answers; no answer is an error."""

import itertools
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

import attrs

from diffalign.core import ConfigError, RewardError

from .connections import Answer, Connections, NoAnswerError

T = TypeVar("T")

_LONGEST_PAUSE = 30.0
_LONGEST_ASKED_PAUSE = 600.0
_PATIENCE = 5.0
"""Seconds within which a server must accept a connection."""
_WORTH_ANOTHER_TRY = frozenset({408, 425, 429, 500, 502, 503, 504})
_OK = 200


class PoorAnswerError(Exception):
    """A complete answer cannot be used, but another try may help."""


@attrs.frozen(eq=False)
class Question(Generic[T]):
    """Request together with the function that reads its answer.

    Args:
        body: builds the request when it is sent, so that few bodies exist at a time
        read: reads the answer. Raises ValueError if it is wrong, PoorAnswerError if another try may help
    """

    body: Callable[[], bytes]
    read: Callable[[bytes], T]


@attrs.define(eq=False)
class Servers:
    """Group of servers that give the same answers.

    After a refused or lost connection, a late answer, or a status 408, 425, 429, 500, 502, 503 or 504, the next server is asked. After
    all servers there is a pause of `backoff * 2^n` seconds (at most 30; longer if `Retry-After` asks for it, up to ten minutes), and then
    the next round begins. Every other status, and a wrong answer, is an error at once.

    Args:
        owner: name of the client in messages
        connections: connections, one for each server
        path: path of the requests
        headers: headers of the requests
        complaint: reads the message from the body of a refusal
        rounds: largest number of rounds
        backoff: seconds before the second round
        concurrency: requests at a time
    """

    owner: str
    connections: Sequence[Connections]
    path: str
    headers: Mapping[str, str]
    complaint: Callable[[bytes], str]
    rounds: int
    backoff: float
    concurrency: int
    _turn: Iterator[int] = attrs.field(factory=itertools.count, init=False, repr=False)

    def ask(self, questions: Sequence[Question[T]]) -> list[T]:
        """Ask the questions, and return their answers in order. The first failure ends the other requests.

        Raises:
            RewardError: a question got no answer or a wrong answer.
        """
        stop = threading.Event()
        with ThreadPoolExecutor(min(self.concurrency, max(len(questions), 1)), "diffalign-servers") as pool:
            answers = [pool.submit(self._ask, question, stop) for question in questions]
            try:
                done, _ = wait(answers, return_when=FIRST_EXCEPTION)
                failed = [error for answer in answers if answer in done and (error := answer.exception()) is not None]
            finally:  # also after an interrupt
                stop.set()
                for answer in answers:
                    answer.cancel()
        if failed:
            raise failed[0]
        return [answer.result() for answer in answers]

    def reach(self) -> None:
        """Refuse servers of which none is there.

        Raises:
            ConfigError: names each, and what happened.
        """
        failures = []
        for server in self.connections:
            try:
                return server.reach(_PATIENCE)
            except NoAnswerError as error:
                failures.append(f"{server.url}: {error}")
        raise ConfigError(f"{self.owner}.url must name a server that runs; got {'; '.join(failures)}. Start it first, or correct the url.")

    def _ask(self, question: Question[T], stop: threading.Event) -> T:
        body, asked, first = question.body(), 0, next(self._turn)
        failure, longer = "", 0.0
        for lap in range(self.rounds):
            if lap and stop.wait(self._pause(lap, longer)):
                break
            for offset in range(len(self.connections)):
                server = self.connections[(first + offset) % len(self.connections)]
                if stop.is_set():
                    break
                asked += 1
                try:
                    answer = server.post(self.path, body, self.headers)
                except NoAnswerError as error:
                    failure = f"{server.url}: {error}"
                    continue
                if answer.status == _OK:
                    try:
                        return question.read(answer.body)
                    except PoorAnswerError as error:
                        failure = f"{server.url}: {error}"
                        continue
                    except ValueError as error:
                        raise RewardError(f"{self.owner}: {server.url} gave a wrong answer: {error}") from error
                failure = f"{server.url} answered {answer.status}: {self.complaint(answer.body)}"
                if answer.status not in _WORTH_ANOTHER_TRY:
                    raise RewardError(f"{self.owner}: {failure}")
                longer = _asked_pause(answer)
        raise RewardError(f"{self.owner}: no score after {asked} {'try' if asked == 1 else 'tries'}; the last failed at {failure}")

    def _pause(self, lap: int, longer: float) -> float:
        """Seconds to wait. A random factor keeps clients from coming back all at once."""
        usual = min(_LONGEST_PAUSE, self.backoff * 2.0 ** (lap - 1) * random.uniform(0.75, 1.25))
        return max(min(longer, _LONGEST_ASKED_PAUSE), usual)


def _asked_pause(answer: Answer) -> float:
    """Seconds that the server asks to wait in `Retry-After`; the form with a date is not read."""
    text = answer.headers.get("retry-after", "")
    return float(text) if text.isascii() and text.isdigit() and len(text) < 6 else 0.0
