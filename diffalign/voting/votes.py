"""Votes of people as a reward."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor

from ..core import Hook, Partial, Progress, Prompt, StepReward
from ..core.demands import reach, require
from ..core.unessential import say_once
from ..rewards.pixels import eight_bit, require_finite
from .attendance import attendance
from .ballots import Ballot, Likes
from .choices import AtRandom, Choice, Disagreement
from .model import Answers, Belief, Looks, VoteModel
from .record import Question, VoteRecord, hashed
from .voters import Replayed, Round, Voters

_LIKES, _MODEL = Likes(), VoteModel()


@attrs.define(eq=False)
class Votes(StepReward):
    """Votes of people on pictures of the run, while it trains.

        reward = mean over people of the value of their answers      of a picture that was voted on
                 what the model of the votes so far expects          of any other picture; without a model it has no score

    Every `every`-th step asks for at most `questions` answers of each person, on pictures that `choice` takes; the run waits until all are
    sent. Votes are written into a file before they count: a run that is continued asks nothing twice, and a session that is replayed gives
    equal weights. Elsewhere than in a training step, in an evaluation for instance, nobody is asked: pictures get what the model expects.
    Scale: 0 to 1. A run with votes is one process.

    Args:
        voters: who is asked
        questions: most questions of a step to each person
        every: steps from one with questions to the next; only a model of votes teaches anything between them
        ballot: form of the questions about a picture
        choice: pictures that are asked about; without a model any are
        model: scores pictures that nobody voted on; None leaves them out
        file: the votes file; None takes `votes.jsonl` in the folder of the run, or memory if there is none
        earlier: votes file of an earlier session, from which the model learns as well

    Reference: TDM-R1 trains on binary feedback, arXiv:2603.07700.
    """

    written: ClassVar[tuple[str, ...]] = ("file",)

    voters: Voters
    questions: int = attrs.field(default=12, validator=attrs.validators.ge(1))
    every: int = attrs.field(default=1, validator=attrs.validators.ge(1))
    ballot: Ballot = attrs.field(factory=Likes)
    choice: Choice = attrs.field(factory=Disagreement)
    model: VoteModel | None = attrs.field(factory=VoteModel)
    file: Path | None = attrs.field(default=None, converter=attrs.converters.optional(Path))
    earlier: Path | None = attrs.field(default=None, converter=attrs.converters.optional(Path))
    _record: VoteRecord | None = attrs.field(default=None, init=False, repr=False)
    _earlier: VoteRecord | None = attrs.field(default=None, init=False, repr=False)
    _next: int = attrs.field(default=0, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        if self.model is None and self.every > 1:
            raise ValueError(
                f"Votes.every must be 1 without a model of votes, because the steps between teach nothing; got {self.every}. Give a model."
            )
        if self.earlier is not None:
            self._earlier = VoteRecord.read(self.earlier)
            if self._earlier.ballot != self.ballot.name:
                raise ValueError(f"Votes.earlier must be of the ballot {self.ballot.name!r}; {self.earlier} is of {self._earlier.ballot!r}")
            self._earlier.require_answers(self.ballot.answers, self.earlier)

    @classmethod
    def replay(
        cls, file: Path, every: int = 1, ballot: Ballot = _LIKES, model: VoteModel | None = _MODEL, earlier: Path | None = None
    ) -> "Votes":
        """Vote as people did in a recorded session; the other arguments are those of the session.

        Args:
            file: the votes file
            every: see `Votes`
            ballot: see `Votes`
            model: see `Votes`
            earlier: see `Votes`
        """
        return cls(Replayed(file), every=every, ballot=ballot, model=model, earlier=earlier)

    @property
    def record(self) -> VoteRecord:
        """Votes so far."""
        if self._record is None:
            self._record = self.voters.record(self.ballot, self.file)
        return self._record

    def hook(self) -> Hook:
        """Give the hook that opens the file and the voters with a run, and closes them with it."""
        return attendance(self)

    def place(self, folder: Path | None) -> Path | None:
        """File that votes are written into, in the folder of a run unless one is named; None in memory, and if a session is replayed."""
        if isinstance(self.voters, Replayed):
            return None
        return self.file if self.file is not None or folder is None else folder / "votes.jsonl"

    def open(self, folder: Path | None, step: int, total: int) -> None:
        """Open the record and the voters."""
        file = self.place(folder)
        if self._record is None or self._record.file != file or file is not None:  # what is in memory alone is kept
            self._record = self.voters.record(self.ballot, file)
        self._next = step
        self.voters.start(self._record, file, step, total)

    def due(self, step: int) -> bool:
        """True if a step asks."""
        return step % self.every == 0

    def reach(self) -> None:
        """Check the servers of simulated people."""
        reach([self.voters])

    def require(self, prompts: Sequence[Prompt]) -> None:
        """Require what simulated people require."""
        require([self.voters], prompts)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor | Partial:
        likes = self._likes(self._looks(images, prompts), self._next)
        if likes is None:
            return Partial(images.new_zeros(len(images)), torch.zeros(len(images), dtype=torch.bool, device=images.device))
        return likes.to(images.device)

    def of_step(self, images: Tensor, prompts: Sequence[Prompt], group: Tensor, progress: Progress) -> Tensor | Partial:
        if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise ValueError("Votes need a run of one process: people cannot vote for several at once. Start it without a launcher.")
        looks = self._looks(images, prompts)
        voted: dict[int, float] = {}
        asked: Sequence[Question] = ()
        absent = self.voters.absent()
        if absent:
            say_once(f"nobody is asked for votes: {absent}")
        elif self.due(progress.step):
            voted, asked = self._asked(images, prompts, looks, progress)
        self._next = progress.step + 1
        values = torch.tensor([voted.get(place, 0.0) for place in range(len(images))], dtype=torch.float32)
        applies = torch.tensor([place in voted for place in range(len(images))], dtype=torch.bool)
        likes = self._likes(looks, progress.step, asked)
        if likes is None:
            return Partial(values.to(images.device), applies.to(images.device))
        return torch.where(applies, values, likes).to(images.device)

    def _asked(
        self, images: Tensor, prompts: Sequence[Prompt], looks: Looks | None, progress: Progress
    ) -> tuple[dict[int, float], Sequence[Question]]:
        """Ask, and give the values of the pictures that were voted on by their places, and the questions."""
        pixels = eight_bit("Votes", images, prompts).cpu()
        names, step = [hashed(picture) for picture in pixels], progress.step
        places: dict[tuple[str, str], list[int]] = {}  # equal pictures of a prompt are one
        for place, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
            places.setdefault((name, str(prompt)), []).append(place)
        belief = self._belief(looks, step)
        questions = [
            question for question in self.record.asked(step) if all((name, question.prompt) in places for name in question.pictures)
        ]
        self.voters.recognise(step, questions)
        if not questions or self.record.sent(step, questions) < set(self.record.people):
            chosen = self._chosen(belief, names, prompts, progress, [found[0] for found in places.values()])
            if set(questions) <= set(chosen):  # a process that was killed may have written some of them alone
                questions = chosen
        features = {(names[place], str(prompts[place])): self._features(looks, place) for place in range(len(names))}
        self.record.ask(step, {question: [features[name, question.prompt] for name in question.pictures] for question in questions})
        pictures = {name: pixels[place] for place, name in enumerate(names)}
        texts = {question: Prompt.of(prompts[places[question.pictures[0], question.prompt][0]]) for question in questions}
        asked = Round(step, progress.total, self.ballot, tuple(questions), pictures, texts, self.record)
        if not questions:
            count = self.ballot.pictures
            say_once(f"nobody is asked for votes at steps without {count} different pictures of a prompt, which {self.ballot.name} need")
        elif not asked.complete:
            self.voters.ask(asked)
            asked.finish()
        answers = self.record.answers(step)
        given = {question: answers[question] for question in questions if question in answers}
        self._foreseen(belief, given, places, step)
        return dict(self._values(given, places)), questions

    def _chosen(
        self, belief: Belief | None, names: Sequence[str], prompts: Sequence[Prompt], progress: Progress, free: Sequence[int]
    ) -> list[Question]:
        """Questions about some of the pictures `free`, which differ: as many as `questions`, if they make as many."""
        size = self.ballot.pictures
        over = (size - 1) * len({str(prompts[place]) for place in free})  # so many may be left over, too few of a prompt for a question
        wanted = min(size * (self.questions - 1) + over + 1, len(free))
        if belief is None:
            order = AtRandom().order(_unknown(len(free)), wanted, progress)
        else:
            index = torch.tensor(free)
            order = self.choice.order(Belief(belief.mean[index], belief.covariance[index][:, index]), wanted, progress)
        by_prompt: dict[str, list[int]] = {}
        missing = self.questions
        for place in (free[number] for number in order):
            some = by_prompt.setdefault(str(prompts[place]), [])
            some.append(place)
            missing -= len(some) % size == 0
            if not missing:
                break
        return [
            Question(tuple(names[place] for place in some[start : start + size]), prompt)
            for prompt, some in by_prompt.items()
            for start in range(0, len(some) - size + 1, size)
        ]

    def _values(
        self, given: Mapping[Question, Mapping[str, int]], places: Mapping[tuple[str, str], Sequence[int]]
    ) -> Iterable[tuple[int, float]]:
        for question, answers in given.items():
            by_person = [self.ballot.values(answer) for answer in answers.values()]
            for number, name in enumerate(question.pictures):
                value = sum(values[number] for values in by_person) / len(by_person)
                yield from ((place, value) for place in places.get((name, question.prompt), ()))

    def _foreseen(
        self,
        belief: Belief | None,
        given: Mapping[Question, Mapping[str, int]],
        places: Mapping[tuple[str, str], Sequence[int]],
        step: int,
    ) -> None:
        """Record in which share of the answers the model, before it knew them, was on the same side."""
        if belief is None or not self._known(step):
            return
        likes = belief.likes.tolist()
        right = []
        for question, answers in given.items():
            scores = [likes[places[name, question.prompt][0]] for name in question.pictures]
            expected = self.ballot.values(self.ballot.answer(scores))[0]
            right += [(expected >= 0.5) == (self.ballot.values(answer)[0] >= 0.5) for answer in answers.values()]
        if right:
            self.record.agree(step, sum(right) / len(right))

    def _looks(self, images: Tensor, prompts: Sequence[Prompt]) -> Looks | None:
        require_finite("Votes", images, prompts)
        return None if self.model is None else self.model.look(images.detach(), prompts)

    def _features(self, looks: Looks | None, place: int) -> Tensor:
        return torch.zeros(0, dtype=torch.float64) if looks is None else looks.features[place]

    def _known(self, before: int, also: Sequence[Question] = ()) -> tuple[Looks, Answers] | None:
        """Pictures and answers that the model learns from: of the steps below `before`, and some questions of that step."""
        values = {answer: self.ballot.values(answer) for answer in self.ballot.answers}
        earlier = None if self._earlier is None else self._earlier.known(math.inf, values)
        found: list[Any] = [earlier, self.record.known(before, values, also)]
        some = [each for each in found if each is not None]
        if len(some) < 2:
            return some[0] if some else None
        (first, answers), (second, later) = some
        return first.joined(second), answers.joined(later)

    def _belief(self, looks: Looks | None, before: int, also: Sequence[Question] = ()) -> Belief | None:
        """Belief about pictures from the votes of `_known`; None without a model."""
        if self.model is None or looks is None:
            return None
        return self.model.belief(*(self._known(before, also) or (Looks.none(looks), Answers.none())), looks)

    def _likes(self, looks: Looks | None, before: int, also: Sequence[Question] = ()) -> Tensor | None:
        """Values that the model expects of pictures, [K] float32; None without a model, or while it knows no votes."""
        belief = None if self._known(before, also) is None else self._belief(looks, before, also)
        return None if belief is None else belief.likes.float()


def _unknown(count: int) -> Belief:
    """Belief of who knows nothing about some pictures."""
    return Belief(torch.zeros(count, dtype=torch.float64), torch.eye(count, dtype=torch.float64))
