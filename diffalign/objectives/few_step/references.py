"""References: what the surrogate's density is compared with."""

from abc import ABC, abstractmethod
from typing import ClassVar

import attrs

from diffalign.core import Follower, Policy, Progress, Ramp


class Reference(ABC):
    """Rule by which the weights behind p_ref come about."""

    trained: ClassVar[bool] = False
    """True if they regress on the surrogate's rows, as a role "reference" with an optimizer of its own."""

    @abstractmethod
    def start(self, teacher: Policy, surrogate: Policy) -> Policy:
        """The reference before the first step: the teacher itself (what is inside a guided one), or a fork of its own."""

    @abstractmethod
    def follow(self, reference: Policy, surrogate: Policy, progress: Progress) -> None:
        """Move the reference, once all roles have done this step of the run."""


@attrs.frozen
class FrozenTeacher(Reference):
    """The teacher, not guided, as in the TDM-R1 release: every improvement since then counts."""

    def start(self, teacher: Policy, surrogate: Policy) -> Policy:
        return teacher

    def follow(self, reference: Policy, surrogate: Policy, progress: Progress) -> None:
        pass


@attrs.frozen
class MovingReference(Reference):
    """A moving average of the surrogate, as in the TDM-R1 paper: reference <- q reference + (1 - q) surrogate.

        q = min(decay, first + rate n)   at step n of the run

    The difference to it is tiny, so the group objective needs a beta some 1000 times larger than with the frozen teacher.

    Args:
        decay: largest q; 0 copies the surrogate, 1 with first = 1 never moves
        first: q at n = 0
        rate: its growth per step
    """

    decay: float = attrs.field(default=0.3, validator=[attrs.validators.ge(0), attrs.validators.le(1)])
    first: float = attrs.field(default=0.001, validator=[attrs.validators.ge(0), attrs.validators.le(1)])
    rate: float = attrs.field(default=0.001, validator=attrs.validators.ge(0))

    def start(self, teacher: Policy, surrogate: Policy) -> Policy:
        return surrogate.fork()

    def follow(self, reference: Policy, surrogate: Policy, progress: Progress) -> None:
        Follower(Ramp(self.first, self.rate, limit=self.decay)).move(reference, surrogate, progress)


@attrs.frozen
class Snapshot(Reference):
    """A copy of the surrogate, renewed now and then.

    Args:
        every: steps between copies
    """

    every: int = attrs.field(default=50, validator=attrs.validators.ge(1))

    def start(self, teacher: Policy, surrogate: Policy) -> Policy:
        return surrogate.fork()

    def follow(self, reference: Policy, surrogate: Policy, progress: Progress) -> None:
        Follower(decay=0.0, every=self.every).move(reference, surrogate, progress)


@attrs.frozen
class StudentScore(Reference):
    """The score of the student itself: a fork of the surrogate that regresses on the same noised ends, without the advantages.

    The other references are not what the samples come from, and against them the group loss learns

        E[A (v* - v_ref) | x_tau] = Cov(A, v* | x_tau) + E[A | x_tau] (v_student - v_ref)

    of which only the first term says what the advantage changes in a picture; the second follows what tells the student from the
    reference. Here v_ref = v_student, and it is zero. Take it as the baseline, too, and `RewardWeighted` as the group objective.
    """

    trained: ClassVar[bool] = True

    def start(self, teacher: Policy, surrogate: Policy) -> Policy:
        return surrogate.fork(trainable=True)

    def follow(self, reference: Policy, surrogate: Policy, progress: Progress) -> None:
        pass


def started(reference: Reference, baseline: Reference, teacher: Policy, surrogate: Policy) -> tuple[Policy, Policy]:
    """Weights of the reference and of the baseline before the first step; the same where both follow one rule.

    Raises:
        ValueError: the baseline must be trained, and the reference, which alone is a role that is, is another one.
    """
    weights = reference.start(teacher, surrogate)
    if baseline == reference:
        return weights, weights
    if baseline.trained:
        kind = type(baseline).__name__
        raise ValueError(
            f"SurrogateReward.baseline {kind} must be the reference as well, because only the reference is trained; the reference is "
            f"{type(reference).__name__}. Give reference={kind}() too."
        )
    return weights, baseline.start(teacher, surrogate)
