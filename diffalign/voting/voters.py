"""Voters: the people who are asked, or who stands in for them."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs
import torch
from torch import Tensor

from ..core import ConfigError, Prompt, RewardFunction, score
from ..core.demands import reach, require
from .ballots import Ballot
from .record import Question, VoteRecord


class VoteError(ValueError):
    """An answer that cannot be counted; the text says why."""


@attrs.define(eq=False)
class Round:
    """Questions of a step, and what has been answered so far. Threads may use it at the same time.

    Args:
        step: number of the step, from 0
        total: steps of the run
        ballot: form of the questions
        questions: the questions
        pictures: hash -> picture [3, H, W] uint8, for all pictures of the questions
        prompts: question -> its prompt
        record: record of the answers
    """

    step: int
    total: int
    ballot: Ballot
    questions: tuple[Question, ...]
    pictures: Mapping[str, Tensor]
    prompts: Mapping[Question, Prompt]
    record: VoteRecord

    def answers(self, person: str) -> list[int | None]:
        """Answers of a person by question; None where there is none."""
        given = self.record.answers(self.step, person)
        return [given.get(question, {}).get(person) for question in self.questions]

    def answer(self, person: str, place: int, answer: int | None) -> None:
        """Take an answer, which replaces an earlier one; None takes it back.

        Raises:
            VoteError: there is no such question or answer, or the person is done with the step.
        """
        if not 0 <= place < len(self.questions):
            raise VoteError(f"question must be a number from 0 to {len(self.questions) - 1}; got {place}")
        if answer is not None and answer not in self.ballot.answers:
            raise VoteError(f"answer must be one of {', '.join(map(str, self.ballot.answers))}, or null; got {answer}")
        with self.record.lock:
            if person in self.done():
                raise VoteError(f"the votes of step {self.step} are sent; they cannot be changed any more")
            self.record.answer(self.step, self.questions[place], person, answer)

    def send(self, person: str) -> None:
        """End the step for a person; what has no answer then stays without. A second time changes nothing."""
        with self.record.lock:
            if person not in self.done():
                self.record.send(self.step, person)

    def finish(self) -> None:
        """End the step for all people, because the run goes on with the votes that there are, and a replay must do so as well."""
        for person in self.record.people:
            self.send(person)

    def done(self) -> set[str]:
        """People who are done with the questions."""
        return self.record.sent(self.step, self.questions)

    @property
    def complete(self) -> bool:
        """True when all people are done with the questions."""
        return self.done() >= set(self.record.people)


class Voters(ABC):
    """Asks people about pictures of a step.

    Args:
        people: names of the people; their votes are kept apart
        strip: pictures of each of some prompts that are drawn for `show`, from equal noise; 0 draws none
    """

    people: Sequence[str]
    strip: int = 0

    def record(self, ballot: Ballot, file: Path | None) -> VoteRecord:
        """Open the record of the votes."""
        return VoteRecord(ballot.name, tuple(self.people), file, tuple(ballot.answers))

    def start(self, record: VoteRecord, file: Path | None, step: int, total: int) -> None:  # noqa: B027  a hook with a default
        """Act before the first step of a run."""

    def show(self, before: bytes, now: bytes, step: int) -> None:  # noqa: B027
        """Take pictures of the same prompts and noise, as the policy drew them before the run and after `step` steps: PNG files."""

    def absent(self) -> str:
        """Reason why nobody can be asked now; "" if people can."""
        return ""

    def recognise(self, step: int, questions: Sequence[Question]) -> None:  # noqa: B027
        """Look at the recorded questions of a step that are about pictures of this run.

        Raises:
            VoteError: some others should be.
        """

    @abstractmethod
    def ask(self, asked: Round) -> None:
        """Ask all people who are not done with the step, and return when it is complete, or when the run should end with it.

        Raises:
            KeyboardInterrupt: the run should stop now, and be continued later.
        """

    def ended(self) -> bool:
        """True if the run should end after this step."""
        return False

    def paused(self) -> bool:
        """True if the run should stop after this step, and be continued later."""
        return False

    def stop(self) -> None:  # noqa: B027
        """Act after the last step, or when the run ends early."""


@attrs.frozen(eq=False)
class Simulated(Voters):
    """Person who is played by a reward, for tests and studies.

        answer = that of the scores R(image, prompt) in [0, 1], exchanged for the opposite one if u < error

    with u in [0, 1) from SHA-256(seed, person, pictures): the same question always gets the same answer, right or wrong.

    Args:
        reward: reward R; a like is a score of at least 1/2
        error: share of wrong answers
        seed: decides which questions get a wrong answer
        people: names of the people, who have equal taste and different errors
    """

    reward: RewardFunction
    error: float = attrs.field(default=0.0, validator=[attrs.validators.ge(0.0), attrs.validators.le(0.5)])
    seed: int = 0
    people: Sequence[str] = attrs.field(default=("simulated",), converter=tuple)

    def reach(self) -> None:
        """Check the server of the inner reward."""
        reach([self.reward])

    def require(self, prompts: Sequence[Prompt]) -> None:
        """Require what the reward inside requires."""
        require([self.reward], prompts)

    def ask(self, asked: Round) -> None:
        shown = [(name, question) for question in asked.questions for name in question.pictures]
        images = torch.stack([asked.pictures[name] for name, _ in shown]).float() / 255
        scores = score({"Simulated.reward": self.reward}, images, [asked.prompts[question] for _, question in shown])["Simulated.reward"]
        by_question: dict[Question, list[float]] = {}
        for (_, question), value in zip(shown, scores.tolist(), strict=True):
            by_question.setdefault(question, []).append(value)
        for person in self.people:
            for place, question in enumerate(asked.questions):
                right = asked.ballot.answer(by_question[question])
                options = list(asked.ballot.answers)
                opposite = options[-1 - options.index(right)]
                asked.answer(person, place, opposite if self._fate(person, question) < self.error else right)
            asked.send(person)

    def _fate(self, person: str, question: Question) -> float:
        digest = hashlib.sha256(f"votes {self.seed} {person} {' '.join(question.pictures)}".encode()).digest()
        return int.from_bytes(digest[:7]) / 2**56


@attrs.define(eq=False)
class Replayed(Voters):
    """Voters of a recorded session, who answer as they did.

    Args:
        file: the votes file

    Raises:
        ConfigError: it cannot be read, or is no votes file.
    """

    file: Path = attrs.field(converter=Path)
    people: Sequence[str] = attrs.field(init=False)
    _record: VoteRecord = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._record = VoteRecord.read(self.file)
        self.people = self._record.people

    def record(self, ballot: Ballot, file: Path | None) -> VoteRecord:
        if ballot.name != self._record.ballot:
            raise ConfigError(f"votes file {self.file} is of the ballot {self._record.ballot!r}; got {ballot.name!r}. Give that one.")
        self._record.require_answers(ballot.answers, self.file)
        return self._record

    def recognise(self, step: int, questions: Sequence[Question]) -> None:
        latest = self._record.latest(step)
        if questions and (missing := len(latest - set(questions))):
            raise VoteError(
                f"{self.file} has votes on pictures of step {step} that this run does not draw: those of {missing} of {len(latest)} "
                "questions. The session was of another run, or on a machine whose arithmetic rounds in another way. Give the same run "
                "file, on a machine of that kind."
            )

    def ask(self, asked: Round) -> None:
        raise VoteError(
            f"{self.file} holds no finished votes on the pictures of step {asked.step}: the session ended before, was of another run, "
            "or on a machine whose arithmetic rounds in another way. Give the same run file, and a --total that the session has reached."
        )
