"""Ballots: what a person is asked about pictures, and what an answer says."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import attrs


class Ballot(ABC):
    """Form of a question about one or several pictures of a prompt.

    Args:
        name: name in votes files and for the page
        pictures: number of pictures of a question
        answers: the answers that there are, as whole numbers
    """

    name: str
    pictures: int
    answers: Sequence[int]

    @abstractmethod
    def values(self, answer: int) -> tuple[float, ...]:
        """Value in [0, 1] of each picture of the question, by the answer."""

    @abstractmethod
    def answer(self, scores: Sequence[float]) -> int:
        """Answer of a person who gives these scores in [0, 1] to the pictures of the question."""


@attrs.frozen
class Likes(Ballot):
    """Yes or no to each picture: 1 if it is liked, 0 if it is not.

    Reference: binary feedback as in TDM-R1, arXiv:2603.07700.
    """

    name = "likes"
    pictures = 1
    answers = (0, 1)

    def values(self, answer: int) -> tuple[float, ...]:
        return (float(answer),)

    def answer(self, scores: Sequence[float]) -> int:
        return int(scores[0] >= 0.5)


@attrs.frozen
class Stars(Ballot):
    """One to `count` stars for each picture; s stars are the value (s - 1) / (count - 1).

    Args:
        count: the most stars
    """

    count: int = attrs.field(default=5, validator=[attrs.validators.ge(2), attrs.validators.le(9)])

    name = "stars"
    pictures = 1

    @property
    def answers(self) -> Sequence[int]:  # type: ignore[override]  # read alone
        """Numbers of stars, from 1 to the most."""
        return range(1, self.count + 1)

    def values(self, answer: int) -> tuple[float, ...]:
        return ((answer - 1) / (self.count - 1),)

    def answer(self, scores: Sequence[float]) -> int:
        return 1 + round(min(max(scores[0], 0.0), 1.0) * (self.count - 1))


@attrs.frozen
class Pairs(Ballot):
    """Choice between two pictures of a prompt: 0 if the first is better, 1 if the second. The better one has the value 1, the other 0.

    A model of votes learns from the difference of the two alone.
    """

    name = "pairs"
    pictures = 2
    answers = (0, 1)

    def values(self, answer: int) -> tuple[float, ...]:
        return (float(answer == 0), float(answer == 1))

    def answer(self, scores: Sequence[float]) -> int:
        return int(scores[1] > scores[0])
