"""The policies beside the student: the frozen teacher, and what starts from it."""

import torch

from diffalign.core import Condition, Policy, require_frozen


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
