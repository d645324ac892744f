"""The policies beside the student: the frozen teacher, and what starts from it."""

from collections.abc import Mapping
from typing import Self

import attrs
import torch

from diffalign.core import Condition, Guided, Policy, require_frozen

from .references import Reference, started


@attrs.frozen(eq=False)
class Beside:
    """The policies beside the student of TDM-R1.

    Args:
        teacher: frozen, perhaps guided
        start: the teacher, not guided: guidance is no density to compare a surrogate with
        fake, surrogate: trained
        old: average of the surrogate, for the trust region
        reference: reference of the surrogate's density ratio
        baseline: policy from which the generator's direction starts
    """

    teacher: Policy
    start: Policy
    fake: Policy
    surrogate: Policy
    old: Policy
    reference: Policy
    baseline: Policy

    @classmethod
    def of(
        cls,
        student: Policy,
        teacher: Policy | None,
        fake: Policy | None,
        surrogate: Policy | None,
        reference: Reference,
        baseline: Reference,
    ) -> Self:
        """Take the given policies, and fork those that are not given: see `SurrogateReward`.

        Raises:
            ValueError: a teacher that could move, a fake or surrogate that could not, a trained baseline that is not the reference.
        """
        held = frozen_teacher(student, teacher)
        start = unguided(held)
        false = moving_fork(start, fake, "fake", student)
        learned = moving_fork(start, surrogate, "surrogate", student)
        return cls(held, start, false, learned, learned.fork(), *started(reference, baseline, start, learned))

    def policies(self) -> Mapping[str, Policy]:
        """Every policy by name, each once."""
        named = {"fake": self.fake, "surrogate": self.surrogate, "old_surrogate": self.old, "teacher": self.teacher}
        if self.reference is not self.start:
            named["reference"] = self.reference
        if self.baseline not in (self.start, self.reference):
            named["baseline"] = self.baseline
        return named


def frozen_teacher(policy: Policy, teacher: Policy | None) -> Policy:
    """The given teacher, which must be frozen, or the policy without its LoRA delta.

    Raises:
        ValueError: a teacher that could move; or none, and a policy that trains all its weights.
    """
    if teacher is None:
        return policy.fork(pristine=True)
    require_frozen(teacher, "teacher")
    return teacher


def moving_fork(start: Policy, given: Policy | None, role: str, policy: Policy) -> Policy:
    """The given policy, or a trainable fork of `start`.

    Raises:
        ValueError: the given one is the student itself, or has nothing to train.
    """
    if given is None:
        return start.fork(trainable=True)
    if given is policy or not given.trainable_parameters():
        raise ValueError(f"{role} must be a policy of its own that can be trained; leave it out, or give teacher.fork(trainable=True)")
    return given


def conditions(student: Policy, teacher: Policy, told: Condition) -> tuple[Condition, Condition]:
    """Encode the prompts for the fake and for the teacher. They may differ, because a student may add a tag to the prompts.

    Args:
        student: student whose ends the fake knows
        teacher: teacher, and whoever reads as it does
        told: condition of the batch, as the student read it
    """
    with torch.no_grad():
        plain = teacher.encode(told.prompts)
    return fake_condition(student, told, plain), plain


def fake_condition(student: Policy, told: Condition, plain: Condition) -> Condition:
    """The prompts as the fake reads them: as the teacher does, unless the student serves several numbers of steps.

    The law of a stage's ends differs by that number, so the fake is told it as the student is.

    Args:
        student: student whose ends the fake knows
        told: condition of the batch, as the student read it
        plain: the same condition, as the teacher reads it
    """
    return told if len(student.step_counts) > 1 else plain


def unguided(teacher: Policy) -> Policy:
    """The policy inside a guided one: what the fake and the surrogate start from, and are held to."""
    return unguided(teacher.policy) if isinstance(teacher, Guided) else teacher
