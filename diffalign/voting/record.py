"""Votes file: JSON lines that say what was asked, what was answered, and when a person was done with a step.

    {"votes": 1, "ballot": "likes", "people": ["you"], "answers": [0, 1]}                                   once, the first line
    {"step": 3, "asked": ["<sha-256>"], "prompt": "a digit", "features": ["<base64>"]}                      once a question
    {"step": 3, "pictures": ["<sha-256>"], "prompt": "a digit", "person": "you", "answer": 1}               once an answer
    {"step": 3, "person": "you", "sent": true}                                                              once a person and step
    {"step": 3, "agreement": 0.75}                                                                          once a step

Of several answers of a person to a question the last one counts; null takes an answer back. Features are little-endian float16. Files of
earlier versions do not name the answers of the ballot.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy
import torch
from torch import Tensor

from ..core import ConfigError
from ..durable import append_line, write_whole
from .model import Answers, Looks

VERSION = 1


def hashed(picture: Tensor) -> str:
    """SHA-256 of the shape and the pixels of a picture [3, H, W] uint8."""
    return hashlib.sha256(repr(tuple(picture.shape)).encode() + picture.contiguous().numpy().tobytes()).hexdigest()


@attrs.frozen
class Question:
    """Question about pictures of a prompt.

    Args:
        pictures: hash of each
        prompt: the text
    """

    pictures: tuple[str, ...]
    prompt: str


@attrs.define(eq=False)
class _Step:
    """Questions and answers of a step; those that were asked last; by person the questions that were asked when they sent their votes."""

    asked: dict[Question, tuple[Tensor, ...]] = attrs.field(factory=dict)
    latest: set[Question] = attrs.field(factory=set)
    answered: bool = False
    answers: dict[Question, dict[str, int]] = attrs.field(factory=dict)
    sent: dict[str, set[Question]] = attrs.field(factory=dict)
    agreement: float | None = None


@attrs.define(eq=False)
class VoteRecord:
    """Votes of a session. Everything is in the file before it counts, so that a process that is killed loses none.

    Threads may read and write it at the same time.

    Args:
        ballot: name of the ballot
        people: names of those who vote
        file: the votes file; None keeps the votes in memory
        options: answers of the ballot; () if they are not known

    Raises:
        ConfigError: the file is no votes file, or one of another ballot or other people.
    """

    ballot: str
    people: tuple[str, ...]
    file: Path | None = None
    options: tuple[int, ...] = ()
    _steps: dict[int, _Step] = attrs.field(factory=dict, init=False)
    _lock: threading.RLock = attrs.field(factory=threading.RLock, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        head = {"votes": VERSION, "ballot": self.ballot, "people": list(self.people), "answers": list(self.options)}
        if self.file is None:
            return
        if self.file.exists():
            _without_a_torn_end(self.file)
            found, lines = _lines(self.file)
            if found is not None and (found["ballot"], found["people"]) != (self.ballot, list(self.people)):
                raise ConfigError(
                    f"votes file {self.file} must be of the ballot {self.ballot!r} and of {', '.join(self.people)}; it is of "
                    f"{found['ballot']!r} and of {', '.join(found['people'])}. Give the same voters and ballot, or another file."
                )
            for number, line in lines:
                self._take_checked(line, number)
            if found is not None:
                wanted, self.options = self.options, tuple(found.get("answers", ()))
                if wanted:
                    self.require_answers(wanted, self.file)
                return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        append_line(self.file, json.dumps(head))

    @classmethod
    def read(cls, file: Path) -> "VoteRecord":
        """Read a votes file, which is not written any more.

        Raises:
            ConfigError: there is none, or it is no votes file.
        """
        try:
            head, lines = _lines(file)
        except OSError as error:
            raise ConfigError(f"votes file {file} cannot be read: {error}") from error
        if head is None:
            raise ConfigError(f"votes file {file} must begin with a line of ballot and people; it is empty")
        record = cls(head["ballot"], tuple(head["people"]), options=tuple(head.get("answers", ())))
        for number, line in lines:
            record._take_checked(line, number, file)
        return record

    def require_answers(self, wanted: Sequence[int], file: Path) -> None:
        """Refuse a ballot that has other answers. Where the file does not name them, those that were given must be among them.

        Args:
            wanted: answers of the ballot
            file: file of these votes, for the message

        Raises:
            ConfigError: it has others.
        """
        given = {answer for step in self._steps.values() for found in step.answers.values() for answer in found.values()}
        if (set(self.options) != set(wanted)) if self.options else (given - set(wanted)):
            raise ConfigError(
                f"votes file {file} must be of a ballot {self.ballot!r} with the answers {_listed(wanted)}; it is of one with "
                f"{_listed(self.options or sorted(given))}. Give the ballot of that session, or another file."
            )

    @property
    def lock(self) -> threading.RLock:
        """Lock that a reader holds who wants several answers of one moment."""
        return self._lock

    def ask(self, step: int, questions: Mapping[Question, Sequence[Tensor]]) -> None:
        """Record questions of a step that are not recorded yet.

        Args:
            step: number of the step
            questions: question -> features [D] of each of its pictures
        """
        with self._lock:
            known = self._steps.get(step, _Step()).asked
            lines = [
                {"step": step, "asked": list(question.pictures), "prompt": question.prompt, "features": list(map(_packed, features))}
                for question, features in questions.items()
                if question not in known
            ]
            self._write(*lines)

    def answer(self, step: int, question: Question, person: str, answer: int | None) -> None:
        """Record an answer; None takes it back."""
        self._write({"step": step, "pictures": list(question.pictures), "prompt": question.prompt, "person": person, "answer": answer})

    def send(self, step: int, person: str) -> None:
        """Record that a person is done with the questions of a step that have been asked so far."""
        self._write({"step": step, "person": person, "sent": True})

    def agree(self, step: int, agreement: float) -> None:
        """Record in which share of the answers of a step the model had foreseen them."""
        self._write({"step": step, "agreement": round(agreement, 4)})

    def asked(self, step: int) -> list[Question]:
        """Questions of a step, in their order."""
        with self._lock:
            return list(self._steps.get(step, _Step()).asked)

    def latest(self, step: int) -> set[Question]:
        """Questions of a step that were asked together, after all others: those about pictures of the run that finished it."""
        with self._lock:
            return set(self._steps.get(step, _Step()).latest)

    def answers(self, step: int, person: str | None = None) -> dict[Question, dict[str, int]]:
        """Answers of a step by question and person; those of one person if it is named."""
        with self._lock:
            found = self._steps.get(step, _Step()).answers.items()
            kept = {question: {name: answer for name, answer in given.items() if person in (None, name)} for question, given in found}
            return {question: given for question, given in kept.items() if given}

    def sent(self, step: int, questions: Iterable[Question]) -> set[str]:
        """People who are done with these questions of a step."""
        wanted = set(questions)
        with self._lock:
            done = self._steps.get(step, _Step()).sent
            return {person for person in self.people if wanted <= done.get(person, set())}

    def agreement(self) -> list[tuple[int, float]]:
        """Share of the answers that the model had foreseen, by step."""
        with self._lock:
            return [(number, step.agreement) for number, step in sorted(self._steps.items()) if step.agreement is not None]

    def count(self, person: str | None = None) -> int:
        """Number of answers, of all people or of one."""
        with self._lock:
            return sum(len(given) for step in self._steps for given in self.answers(step, person).values())

    def between(self) -> dict[tuple[str, str], tuple[float, int]]:
        """Share of equal answers of each two people, and the number of questions that both have answered."""
        found: dict[tuple[str, str], tuple[float, int]] = {}
        with self._lock:
            for place, one in enumerate(self.people):
                for other in self.people[place + 1 :]:
                    both = [
                        given[one] == given[other]
                        for step in self._steps.values()
                        for given in step.answers.values()
                        if one in given and other in given
                    ]
                    if both:
                        found[one, other] = sum(both) / len(both), len(both)
        return found

    def known(self, before: float, values: Mapping[int, Sequence[float]], also: Sequence[Question] = ()) -> tuple[Looks, Answers] | None:
        """Answered questions of the steps below `before`, for a model; None if there are none.

        Args:
            before: number of a step
            values: answer -> value in [0, 1] of each picture of the question
            also: questions of the step `before` that count as well
        """
        features: list[Tensor] = []
        prompts: list[str] = []
        rows: list[tuple[int, int, float, int]] = []  # first picture, number of pictures, value, people
        with self._lock:
            earlier = [self._steps[number] for number in sorted(step for step in self._steps if step < before)]
            some = [(step, question) for step in earlier for question in step.asked]
            some += [(self._steps[int(before)], question) for question in also]
            for step, question in some:
                given, looks = step.answers.get(question, {}), step.asked[question]
                if not given:
                    continue
                scores = [2 * values[given[person]][0] - 1 for person in self.people if person in given]
                rows.append((len(features), len(looks), sum(scores) / len(scores), len(scores)))
                features += looks
                prompts += [question.prompt] * len(looks)
        if not rows:
            return None
        weights = torch.zeros(len(rows), len(features), dtype=torch.float64)
        for row, (first, pictures, _, _) in enumerate(rows):
            weights[row, first] = 1.0
            if pictures == 2:
                weights[row, first + 1] = -1.0
        given_values, people = (torch.tensor(column, dtype=torch.float64) for column in zip(*[row[2:] for row in rows], strict=True))
        return Looks(torch.stack(features), prompts), Answers(weights, given_values, people)

    def _write(self, *lines: Mapping[str, Any]) -> None:
        """Write lines at once: all or none, unless the process is killed meanwhile."""
        with self._lock:
            if self.file is not None and lines:
                append_line(self.file, "\n".join(map(json.dumps, lines)))
            for line in lines:
                self._take(line)

    def _take(self, line: Mapping[str, Any]) -> None:
        step = self._steps.setdefault(line["step"], _Step())
        latest = set() if step.answered else step.latest
        step.answered = "asked" not in line
        if "asked" in line:
            question = Question(tuple(line["asked"]), line["prompt"])
            step.asked[question] = tuple(map(_unpacked, line["features"]))
            step.latest = latest | {question}
        elif "sent" in line:
            step.sent[line["person"]] = set(step.asked)
        elif "agreement" in line:
            step.agreement = line["agreement"]
        else:
            given = step.answers.setdefault(Question(tuple(line["pictures"]), line["prompt"]), {})
            given.pop(line["person"], None)
            if line["answer"] is not None:
                given[line["person"]] = line["answer"]

    def _take_checked(self, line: Any, number: int, file: Path | None = None) -> None:
        try:
            self._take(line)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"votes file {file or self.file}, line {number}, must be a question, an answer, the end of a step or an agreement: "
                f"{type(error).__name__}: {error}"
            ) from error


def _lines(file: Path) -> tuple[dict[str, Any] | None, list[tuple[int, Any]]]:
    """First line of a votes file, and the others with their numbers. A last line that was not finished does not count."""
    try:
        texts = file.read_text(encoding="utf-8").split("\n")[:-1]
        lines = [(number, json.loads(text)) for number, text in enumerate(texts, start=1)]
    except (ValueError, UnicodeDecodeError) as error:
        raise ConfigError(f"votes file {file} must hold JSON lines: {error}") from error
    if not lines:
        return None, []
    head = lines[0][1]
    whole = isinstance(head, dict) and all(isinstance(value, list) for value in (head.get("people"), head.get("answers", [])))
    if not whole or head.get("votes") != VERSION or "ballot" not in head:
        raise ConfigError(f"votes file {file} must begin with a line of ballot and people, version {VERSION}; it begins with {head}")
    return head, lines[1:]


def _without_a_torn_end(file: Path) -> None:
    """Remove a last line that a killed process did not finish."""
    text = file.read_text(encoding="utf-8", errors="replace")
    if text and not text.endswith("\n"):
        write_whole(file, "".join(text.splitlines(keepends=True)[:-1]))


def _listed(answers: Iterable[int]) -> str:
    return ", ".join(map(str, answers))


def _packed(features: Tensor) -> str:
    return base64.b64encode(features.numpy().astype("<f2").tobytes()).decode("ascii")


def _unpacked(text: str) -> Tensor:
    return torch.from_numpy(numpy.frombuffer(base64.b64decode(text, validate=True), dtype="<f2").astype(numpy.float64))


def described(between: Mapping[tuple[str, str], tuple[float, int]]) -> Iterable[str]:
    """Say how far people agree, one line for each two."""
    for (one, other), (share, count) in between.items():
        yield f"{one} and {other} agree in {share:.0%} of {count} answers"
