"""Desk between a run that waits for votes and the page on which they are given."""

import base64
import hmac
import json
import math
import secrets
import stat
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs

from ..core import ConfigError
from ..durable import write_whole
from ..rewards.png import encode_png
from .record import VoteRecord, described
from .voters import Round, VoteError


class StaleError(Exception):
    """Votes on a step that is not, or no longer, asked about."""


@attrs.define(eq=False)
class Desk:
    """State that the run and the page share. The run waits on it without using a core; the page asks it from the server's thread.

    Args:
        tokens: person -> secret of the link
        record: the votes
        total: steps of the run
    """

    tokens: Mapping[str, str]
    record: VoteRecord
    total: int
    _round: Round | None = attrs.field(default=None, init=False)
    _strip: tuple[bytes, bytes, int] = attrs.field(default=(b"", b"", 0), init=False, repr=False)
    _step: int = attrs.field(default=0, init=False)
    _asking: int = attrs.field(default=0, init=False)
    _closed: bool = attrs.field(default=False, init=False)
    _stopping: str = attrs.field(default="", init=False)
    _seen: float = attrs.field(default=-math.inf, init=False)
    _changed: threading.Condition = attrs.field(factory=threading.Condition, init=False, repr=False)

    def person(self, token: str) -> str | None:
        """Person of a token; None if it is nobody's."""
        found = [name for name, known in self.tokens.items() if hmac.compare_digest(known.encode(), token.encode())]
        return found[0] if found else None

    @property
    def ending(self) -> bool:
        """True if somebody has asked on the page that the run ends after this step."""
        return self._stopping == "end"

    @property
    def pausing(self) -> bool:
        """True if somebody has paused the run on the page."""
        return self._stopping == "pause"

    def begin(self, step: int) -> None:
        """Say how many steps are done before a run begins."""
        with self._changed:
            self._step = step

    def show(self, before: bytes, now: bytes, step: int) -> None:
        """Show pictures of the same prompts and noise at the start and after `step` steps: PNG files."""
        with self._changed:
            self._strip, self._step, self._asking = (before, now, step), step, self._asking + 1

    def close(self) -> None:
        """Say that the run has stopped."""
        with self._changed:
            self._round, self._closed = None, True

    def wait(self, asked: Round, waiting: Callable[[], None], remind: float) -> None:
        """Put questions on the page, and wait until all people have sent their votes.

        Args:
            asked: the questions
            waiting: called at once, and again every `remind` seconds
            remind: seconds

        Raises:
            KeyboardInterrupt: somebody has paused the run.
        """
        with self._changed:
            self._round, self._step, self._asking = asked, asked.step, self._asking + 1
            try:
                due = time.monotonic()
                while not asked.complete and self._stopping != "end":
                    if self._stopping == "pause":
                        raise KeyboardInterrupt("paused on the page")
                    if time.monotonic() >= due:
                        waiting()
                        due += remind
                    self._changed.wait(max(0.0, due - time.monotonic()))
            finally:
                self._round = None

    def answer(self, person: str, step: int, question: int, answer: int | None) -> None:
        """Take an answer.

        Raises:
            StaleError: it is about a step that is not asked about.
            VoteError: there is no such question or answer, or the person has sent this step.
        """
        with self._changed:
            self._open(step).answer(person, question, answer)

    def send(self, person: str, step: int) -> None:
        """End the step for a person; errors are those of `answer`."""
        with self._changed:
            self._open(step).send(person)
            self._changed.notify_all()

    def stop(self, how: str) -> None:
        """Pause the run at once, or end it after this step with the votes that there are.

        Args:
            how: "pause" or "end"
        """
        if how not in ("pause", "end"):
            raise VoteError(f"how must be 'pause' or 'end'; got {how!r}")
        with self._changed:
            self._stopping = how
            self._changed.notify_all()

    def watched(self, seconds: float) -> bool:
        """True if a page has asked for the state within so many seconds."""
        return time.monotonic() - self._seen < seconds

    def state(self, person: str) -> dict[str, Any]:
        """Everything that a page shows, but for pictures."""
        with self._changed:
            self._seen, asked = time.monotonic(), self._round
            state: dict[str, Any] = {
                "person": person,
                "people": list(self.record.people),
                "phase": self._phase(person),
                "step": self._step,
                "total": self.total,
                "asking": self._asking,
                "votes": self.record.count(person),
                "agreement": [[step + 1, share] for step, share in self.record.agreement()],
                "between": list(described(self.record.between())),
            }
            if asked is not None:
                sent = asked.done()
                state |= {
                    "answers": asked.answers(person),
                    "missing": [name for name in self.record.people if name not in sent],
                }
            return state

    def pictures(self) -> dict[str, Any]:
        """Questions with their pictures, and the strip, as data addresses."""
        with self._changed:
            before, now, step = self._strip
            shown: dict[str, Any] = {"asking": self._asking, "strip": [_address(before), _address(now)] if before else [], "shown": step}
            asked = self._round
        if asked is not None:
            shown |= {
                "ballot": asked.ballot.name,
                "choices": list(asked.ballot.answers),
                "questions": [
                    {
                        "prompt": question.prompt,
                        "pictures": [f"data:image/png;base64,{encode_png(asked.pictures[name])}" for name in question.pictures],
                    }
                    for question in asked.questions
                ],
            }
        return shown

    def _phase(self, person: str) -> str:
        if self._closed:
            return "stopped"
        if self._stopping:
            return {"pause": "pausing", "end": "ending"}[self._stopping]
        if self._round is None:
            return "training"
        return "sent" if person in self._round.done() else "voting"

    def _open(self, step: int) -> Round:
        if self._round is None:
            raise StaleError(f"nothing is asked at the moment; the run is at step {self._step}. Reload the page.")
        if self._round.step != step:
            raise StaleError(f"step {step} is over; votes are asked on step {self._round.step}. Reload the page.")
        return self._round


def _address(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode('ascii')}"


def tokens_of(people: tuple[str, ...], file: Path | None) -> dict[str, str]:
    """Secrets of the links, one for each person. They are kept in a file that only its owner can read, so that old links stay good.

    Args:
        people: names
        file: the file; None makes new secrets

    Raises:
        ConfigError: the file is there and holds something else.
    """
    kept: dict[str, str] = {}
    if file is not None and file.exists():
        try:
            kept = {str(name): str(token) for name, token in json.loads(file.read_text(encoding="utf-8")).items()}
        except (OSError, ValueError, AttributeError) as error:
            raise ConfigError(f"{file} must hold the secrets of the links: {error}. Remove it, and new links are made.") from error
    tokens = {person: kept.get(person) or secrets.token_urlsafe(16) for person in people}
    if file is not None and tokens != kept:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(tokens), private=True)
    elif file is not None and stat.S_IMODE(file.stat().st_mode) & 0o077:  # earlier versions could leave it so
        file.chmod(0o600)
    return tokens
